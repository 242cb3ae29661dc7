//! Pods and their containers.

pub mod config;
