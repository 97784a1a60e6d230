//! Tests of the adapter module.
