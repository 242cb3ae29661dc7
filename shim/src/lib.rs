//! Both ends of the shim wire.
