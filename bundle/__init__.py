"""The ground floor: manifest, model configuration, weight store, hashing, atomic writing, precision names, errors."""
