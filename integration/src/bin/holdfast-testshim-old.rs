//! A shim of the tests: the contract as the `containerd-shim` crate had it before containerd 2.0 (a bare
//! address as the answer to `start`, version 2 of the Task service).

holdfast_integration::test_shim!(containerd_shim_old, "io.containerd.testold.v2");
