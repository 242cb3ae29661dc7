//! Wire types only: generated at build time, never edited, no behaviour.
//!
//! - [`cri`]: the Kubernetes Container Runtime Interface v1, from `proto/cri.proto`.
//! - [`admin`]: what our command line needs beyond the CRI, from `proto/admin.proto`.
//! - [`containerd`]: what the kubelet's cAdvisor calls, from `proto/containerd`.
//! - [`images`]: the same for images, from `proto/images.proto`.
//! - [`nri`]: the Node Resource Interface's plugin protocol, from `proto/nri.proto`.
//! - [`shim`]: containerd's shim services over ttrpc, re-exported from `containerd-shim-protos`.

/// CRI v1 (package `runtime.v1`) as of Kubernetes 1.37.
#[cfg(feature = "cri")]
#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub mod cri {
    tonic::include_proto!("runtime.v1");
    /// The compiled `FileDescriptorSet` of this package.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.proto.bin"));
}

/// The Admin service (package `holdfast.admin.v1`).
#[cfg(feature = "admin")]
#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub mod admin {
    tonic::include_proto!("holdfast.admin.v1");
    /// The compiled `FileDescriptorSet` of this package.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/admin.proto.bin"));
}

/// The few gRPC services of containerd that the kubelet's cAdvisor calls, without what changes
/// anything. The modules' nesting is that of the packages.
#[cfg(feature = "containerd")]
#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub mod containerd {
    pub mod services {
        pub mod version {
            pub mod v1 {
                tonic::include_proto!("containerd.services.version.v1");
            }
        }
        pub mod containers {
            pub mod v1 {
                tonic::include_proto!("containerd.services.containers.v1");
            }
        }
        pub mod tasks {
            pub mod v1 {
                tonic::include_proto!("containerd.services.tasks.v1");
            }
        }
    }
    pub mod v1 {
        pub mod types {
            tonic::include_proto!("containerd.v1.types");
        }
    }
}

/// NRI (package `nri.pkg.api.v1alpha1`): messages alone, the services are spoken over ttrpc.
#[cfg(feature = "nri")]
#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub mod nri {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
    /// The compiled `FileDescriptorSet` of this package.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nri.proto.bin"));
}

/// The Images service (package `holdfast.images.v1`).
#[cfg(feature = "admin")]
#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub mod images {
    tonic::include_proto!("holdfast.images.v1");
    /// The compiled `FileDescriptorSet` of this package.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/images.proto.bin"));
}

/// containerd's Task, Sandbox and Events services and their messages.
#[cfg(feature = "shim")]
pub mod shim {
    pub use containerd_shim_protos::{
        api, bootstrap_api, cgroups, cgroups_v2, events, sandbox_api, sandbox_async,
        shim::{event, oci},
        shim_async, topics, types,
    };
    pub use {protobuf, ttrpc};
}
