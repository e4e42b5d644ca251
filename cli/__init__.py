"""The command line: one thin file per verb, loaded when the verb is used."""
