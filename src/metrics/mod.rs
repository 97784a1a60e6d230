//! What a training run writes for people and tools: lines, JSONL, TensorBoard event files.
