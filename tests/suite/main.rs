//! The one test binary.
mod goldens;
mod packing;
mod support;
