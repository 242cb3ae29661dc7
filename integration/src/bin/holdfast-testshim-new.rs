//! A shim of the tests: the contract as the `containerd-shim` crate has it since containerd 2.3
//! (BootstrapParams or options on standard input, version 3 of the Task service alone).

holdfast_integration::test_shim!(containerd_shim, "io.containerd.testnew.v3");
