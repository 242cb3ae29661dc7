//! The test harness: a real daemon with real runtimes, each on its own ground.
//!
//! A test starts a [`Node`]: one `holdfastd` process with directories, CRI socket, bridge, subnet and
//! cgroup of its own, so any number of tests run side by side. What a test then does reads as a story:
//!
//! ```no_run
//! # use holdfast_integration::Node;
//! # async fn story() -> anyhow::Result<()> {
//! let mut node = Node::start().await?;
//! let image = node.busybox().await?;
//! let pod = node.pod("a").run().await?;
//! let container = pod.container(&image).sh("echo hello; sleep 60").start().await?;
//! container.wait_for_log("hello").await?;
//! node.kill9()?;
//! node.restart().await?;
//! assert_eq!(container.status().await?.id, container.id);
//! node.finish().await
//! # }
//! ```
//!
//! [`Node::finish`] removes every pod and fails when anything is left: mounts, cgroups, processes,
//! sockets, addresses, links. A test that panics before is cleaned up after by [`Node`]'s `Drop`, and
//! one that was killed by the next process that starts a node ([`ground::sweep_abandoned`]).
//!
//! Faults are programs, not mocks: [`fake`] wraps the real runtime and the real CNI plugins in scripts
//! that hang or fail on request, and [`registry::Scripted`] serves what no registry would.
//!
//! Binaries under test come from the directory `HOLDFAST_BIN_DIR`, which `make test` fills; without it
//! the harness runs `make test-bins` once ([`binaries`]).

/// Makes two tests of each function, `runc::name` and `crun::name`, that call it with the runtime's
/// name.
#[macro_export]
macro_rules! with_each_runtime {
    ($($name:ident)*) => {
        mod runc {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() -> anyhow::Result<()> { super::$name("runc").await })*
        }
        mod crun {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() -> anyhow::Result<()> { super::$name("crun").await })*
        }
    };
}

pub mod bench;
pub mod binaries;
pub mod conformance;
pub mod crash;
pub mod cri;
pub mod disk;
pub mod fake;
pub mod fuse;
pub mod ground;
pub mod hugetlb;
pub mod image;
pub mod leaks;
pub mod log;
pub mod memory;
pub mod node;
pub mod nri;
pub mod pod;
pub mod proxy;
pub mod registry;
pub mod tar;
pub mod testshim;
pub mod wait;

pub use image::Image;
pub use node::Node;
pub use pod::{Container, Pod};
pub use registry::Registry;
pub use wait::eventually;
