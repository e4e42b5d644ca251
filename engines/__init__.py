"""From a bundle to TensorRT engines: targets, builder, what the compiler did, engine sets, memory plans."""
