//! Training on the shards that the ranks hold.
