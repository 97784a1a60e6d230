//! Training data: files in, batches of packed sequences out, in an order that is a function of (seed, epoch).
