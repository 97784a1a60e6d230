//! Models as differentiable functions over weights that somebody else provides.
