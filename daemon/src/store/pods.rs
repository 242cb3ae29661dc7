//! Records of pods and containers: what is intended, and the last state that was seen.
//!
//! A record is a JSON document: fields are only ever added, with a default, so that daemons of
//! neighbouring versions read each other's.

use std::{net::IpAddr, path::PathBuf, time::SystemTime};

use holdfast_shim::client::Endpoint;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Error, Store,
    copies::{self, Copies},
};
use crate::{
    config::ForeignHandler,
    id::{ContainerId, PodId},
    pod::{
        config::{ContainerConfig, ImageDefaults, PodConfig, Resources, User},
        state::{ContainerState, PodState},
    },
};

/// A pod's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// Its id.
    pub id: PodId,
    /// As asked for.
    pub config: PodConfig,
    /// Runtime handler as asked for; empty: the default.
    pub handler: String,
    /// The OCI runtime's path at creation: a pod stays with it whatever the config says later.
    pub runtime: PathBuf,
    /// The shim that runs its containers, if it is not ours.
    #[serde(default)]
    pub foreign: Option<ForeignHandler>,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// Last state.
    pub state: PodState,
    /// Where its shim listens; `None` until it was started.
    #[serde(default)]
    pub endpoint: Option<Endpoint>,
    /// Addresses, primary first; empty for the node's network.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// The boot that it was made in; empty: of a release that did not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub boot: String,
    /// What a later release has added: it survives our writes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Fields of a document that this release does not know.
pub type Unknown = serde_json::Map<String, serde_json::Value>;

/// A container's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: ContainerId,
    /// The pod it is in.
    pub pod: PodId,
    /// As asked for.
    pub config: ContainerConfig,
    /// Config digest of its image.
    pub image_id: String,
    /// "name@digest" of its image if it has one, else its id.
    pub image_ref: String,
    /// What the image said when the container was made.
    #[serde(default)]
    pub image: ImageDefaults,
    /// Who it runs as.
    #[serde(default)]
    pub user: User,
    /// Stop signal by number.
    pub stop_signal: i32,
    /// Whole path of the log; empty: none.
    #[serde(default)]
    pub log: PathBuf,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// Last state.
    pub state: ContainerState,
    /// The limits of the request, where NRI plugins have set others, which are those of `config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_resources: Option<Box<Resources>>,
    /// It did not end by itself: the machine went down. `finished_at` is then that of the next boot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rebooted: bool,
    /// What a later release has added: it survives our writes.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A record that this release cannot read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// Of this pod or container.
    pub id: String,
    /// The pod that a container is in.
    pub pod: Option<String>,
    /// Why.
    pub error: String,
}

/// All records of pods and containers.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Pods.
    pub pods: Vec<PodRecord>,
    /// Containers.
    pub containers: Vec<ContainerRecord>,
    /// What is to be left alone: a later release may have written it.
    pub unread: Vec<Unread>,
}

impl ContainerRecord {
    /// Whether it was made by a request with that configuration.
    pub fn is_of(&self, config: &ContainerConfig) -> bool {
        match &self.asked_resources {
            None => self.config == *config,
            Some(asked) => {
                **asked == config.resources
                    && ContainerConfig { resources: (**asked).clone(), ..self.config.clone() }
                        == *config
            }
        }
    }
}

fn to_json(of: &str, record: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|e| Error::Record(of.to_owned(), e))
}

fn all<T: DeserializeOwned>(
    db: &Connection,
    sql: &str,
    unread: &mut Vec<Unread>,
) -> Result<Vec<T>, Error> {
    let mut statement = db.prepare(sql)?;
    let rows = statement.query_map([], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, Option<String>>(2)?))
    })?;
    let mut read = Vec::new();
    for row in rows {
        let (id, text, pod) = row?;
        match serde_json::from_str(&text) {
            Ok(record) => read.push(record),
            Err(error) => unread.push(Unread { id, pod, error: error.to_string() }),
        }
    }
    Ok(read)
}

impl Store {
    /// Writes a pod's record.
    pub async fn put_pod(&self, record: &PodRecord) -> Result<(), Error> {
        let (id, text) = (record.id.to_string(), to_json(record.id.as_str(), record)?);
        let then = Copies::put(id.clone());
        let job = move |db: &Connection| {
            db.prepare_cached(
                "INSERT INTO pods (id, record) VALUES (?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET record = excluded.record, revision = revision + 1",
            )?
            .execute(params![id, text])?;
            copies::of_pod(db, &id)
        };
        self.call_then(job, then).await.map(drop)
    }

    /// Writes a container's record.
    pub async fn put_container(&self, record: &ContainerRecord) -> Result<(), Error> {
        let (id, pod) = (record.id.to_string(), record.pod.to_string());
        let text = to_json(&id, record)?;
        let then = Copies::put(id.clone());
        let job = move |db: &Connection| {
            db.prepare_cached(
                "INSERT INTO containers (id, pod, record) VALUES (?1, ?2, ?3)
                 ON CONFLICT (id) DO UPDATE SET record = excluded.record, revision = revision + 1",
            )?
            .execute(params![id, pod, text])?;
            copies::of_container(db, &id)
        };
        self.call_then(job, then).await.map(drop)
    }

    /// Forgets a container.
    pub async fn delete_container(&self, id: &ContainerId) -> Result<(), Error> {
        let id = id.to_string();
        self.call(move |db| {
            db.execute("DELETE FROM containers WHERE id = ?1", [id])?;
            Ok(())
        })
        .await
    }

    /// Forgets a pod and its containers.
    pub async fn delete_pod(&self, id: &PodId) -> Result<(), Error> {
        let id = id.to_string();
        self.call(move |db| {
            db.execute("DELETE FROM containers WHERE pod = ?1", [&id])?;
            db.execute("DELETE FROM pods WHERE id = ?1", [&id])?;
            Ok(())
        })
        .await
    }

    /// Every pod and every container that can be read.
    pub async fn load(&self) -> Result<(Vec<PodRecord>, Vec<ContainerRecord>), Error> {
        self.load_all().await.map(|loaded| (loaded.pods, loaded.containers))
    }

    /// Every pod and every container, and what cannot be read.
    pub async fn load_all(&self) -> Result<Loaded, Error> {
        self.call(|db| {
            let mut unread = Vec::new();
            let pods = all(db, "SELECT id, record, NULL FROM pods", &mut unread)?;
            let containers = all(db, "SELECT id, record, pod FROM containers", &mut unread)?;
            Ok(Loaded { pods, containers, unread })
        })
        .await
    }
}
