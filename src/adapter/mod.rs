//! Adapters as PEFT writes them: configuration, names of tensors, the arithmetic of merging.
