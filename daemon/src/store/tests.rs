use super::*;
use super::{
    images::{ImageRecord, LayerRecord},
    migrate::{MIGRATIONS, Migration, Unusable, migrate},
    pods::{ContainerRecord, PodRecord},
};
use crate::{
    id::{ContainerId, Digest, PodId},
    pod::state::{ContainerState, Exit, PodState},
};

#[tokio::test]
async fn a_failed_job_is_undone_alone_and_results_survive_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = Store::open(&path).unwrap();
    store.call(|db| Ok(db.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)")?)).await.unwrap();
    let jobs = (0..50).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .call(move |db| {
                    db.execute("INSERT INTO t VALUES (?1)", [n / 2])?;
                    Ok(())
                })
                .await
                .is_ok()
        })
    });
    let done = futures::future::join_all(jobs).await;
    assert_eq!(done.into_iter().filter(|r| *r.as_ref().unwrap()).count(), 25);
    drop(store);
    let store = Store::open(&path).unwrap();
    let count: i64 = store
        .call(|db| Ok(db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))
        .await
        .unwrap();
    assert_eq!(count, 25);
}

/// A database of each schema version that ever was, with what a daemon of that time had written: two pods,
/// one of them stopped, three containers in all their states, an image of two layers with three names.
const FIXTURES: [(i64, &str); 2] =
    [(1, include_str!("fixtures/v1.sql")), (2, include_str!("fixtures/v2.sql"))];

fn fixture(dir: &Path, sql: &str) -> PathBuf {
    let path = dir.join("holdfast.db");
    Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    path
}

/// What there is to find in each of [`FIXTURES`].
async fn assert_is_the_fixture(store: &Store) {
    let (mut pods, mut containers) = store.load().await.unwrap();
    pods.sort_by(|a, b| a.config.name.cmp(&b.config.name));
    containers.sort_by(|a, b| a.config.name.cmp(&b.config.name));
    let names: Vec<_> = pods.iter().map(|pod| (&*pod.config.name, pod.config.attempt)).collect();
    assert_eq!(names, [("stopped", 0), ("web", 2)]);
    assert_eq!([pods[0].state, pods[1].state], [PodState::NotReady, PodState::Ready]);
    let web = &pods[1];
    assert_eq!(web.config.namespace, "shop");
    assert_eq!(web.config.labels["app"], "web");
    assert_eq!(web.config.annotations["note"], "kept");
    assert!(web.endpoint.is_some());
    let names: Vec<_> = containers.iter().map(|c| &*c.config.name).collect();
    assert_eq!(names, ["done", "made", "main"]);
    assert!(containers.iter().all(|container| container.pod == web.id));
    assert!(matches!(&containers[0].state, ContainerState::Exited { how: Exit::Code(3), .. }));
    assert!(matches!(containers[1].state, ContainerState::Created { pid: Some(_) }));
    assert!(matches!(containers[2].state, ContainerState::Running { .. }));
    assert_eq!(containers[2].config.env, [("MODE".to_owned(), "fast".to_owned())]);
    let stored = store.load_images().await.unwrap();
    assert_eq!((stored.layers.len(), stored.images.len(), stored.snapshots.len()), (2, 1, 3));
    let image = &stored.images[0];
    assert_eq!(image.layers, [2, 3]);
    let names: Vec<_> = image.names.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names[..2], ["registry.example/app:1", "registry.example/app:stable"]);
    assert!(names[2].starts_with("registry.example/app@sha256:"));
    assert!(image.config.starts_with(b"{") && image.record.size > 1_000_000);
    assert!(stored.snapshots.iter().all(|snapshot| snapshot.layers == [2, 3]));
}

/// Every statement of a schema, in one form.
fn schema(path: &Path) -> Vec<String> {
    let db = Connection::open(path).unwrap();
    let mut statement =
        db.prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name").unwrap();
    let rows = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
    rows.map(|sql| sql.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[tokio::test]
async fn a_database_of_each_version_is_brought_up_to_date_with_all_that_it_has() {
    assert_eq!(
        FIXTURES.map(|(version, _)| version).to_vec(),
        Vec::from_iter(1..=migrate::version())
    );
    let dir = tempfile::tempdir().unwrap();
    let fresh = dir.path().join("fresh.db");
    drop(Store::open(&fresh).unwrap());
    for (version, sql) in FIXTURES {
        let dir = tempfile::tempdir().unwrap();
        let path = fixture(dir.path(), sql);
        assert_eq!(migrate::found(&Connection::open(&path).unwrap()).unwrap(), version);
        // Twice: the second time there is nothing to do.
        for _ in 0..2 {
            let store =
                Store::open_with_copies(&path, &dir.path().join("b"), &dir.path().join("i"))
                    .unwrap();
            assert_eq!(store.opening().damage, None, "version {version}");
            assert_eq!(store.opening().schema, migrate::version());
            assert_is_the_fixture(&store).await;
            closed(store).await;
        }
        assert_eq!(schema(&path), schema(&fresh), "version {version}");
    }
}

/// Waits until the store's thread has closed the database.
async fn closed(store: Store) {
    let path = store.opening().path.clone();
    drop(store);
    for _ in 0..500 {
        let db = Connection::open(&path).unwrap();
        db.busy_timeout(std::time::Duration::ZERO).unwrap();
        if db
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))
            .is_ok()
        {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the database is not closed");
}

/// What a later release might add; its daemons allow ours to go on with it.
fn later(compatible_down_to: i64) -> Vec<Migration> {
    let known = MIGRATIONS.iter().map(|m| Migration { sql: m.sql, ..*m });
    known
        .chain([Migration {
            sql: "CREATE TABLE leases (pod TEXT PRIMARY KEY, until INTEGER NOT NULL) STRICT;
                  ALTER TABLE pods ADD COLUMN weight INTEGER NOT NULL DEFAULT 7;",
            compatible_down_to,
        }])
        .collect()
}

#[tokio::test]
async fn what_a_later_release_wrote_survives_an_older_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let path = fixture(dir.path(), FIXTURES[1].1);
    let mut db = Connection::open(&path).unwrap();
    migrate(&mut db, &later(migrate::version())).unwrap();
    db.execute_batch(
        r#"INSERT INTO leases SELECT id, 99 FROM pods;
           UPDATE pods SET weight = 3, record = json_set(record, '$.flavour', json('{"a":[1]}'));
           UPDATE containers SET record = json_set(record, '$.flavour', 'sweet');
           INSERT INTO pods (id, record) VALUES ('unreadable', '{"state":"Dormant"}');
           INSERT INTO containers (id, pod, record) VALUES ('lost', 'unreadable', '{"state":"Odd"}');"#,
    )
    .unwrap();
    drop(db);

    // Today's daemon goes on with it, and writes what it changes.
    let store =
        Store::open_with_copies(&path, &dir.path().join("b"), &dir.path().join("i")).unwrap();
    assert_eq!(store.opening().schema, migrate::version() + 1);
    assert!(
        store.opening().summary().contains("of a later release"),
        "{}",
        store.opening().summary()
    );
    assert_is_the_fixture(&store).await;
    let loaded = store.load_all().await.unwrap();
    let unread: Vec<_> = loaded.unread.iter().map(|u| (&*u.id, u.pod.as_deref())).collect();
    assert_eq!(unread, [("unreadable", None), ("lost", Some("unreadable"))]);
    let mut pod = loaded.pods.into_iter().find(|pod| pod.config.name == "web").unwrap();
    pod.state = PodState::NotReady;
    store.put_pod(&pod).await.unwrap();
    let mut container = loaded.containers.into_iter().find(|c| c.config.name == "main").unwrap();
    container.config.labels.insert("changed".into(), "yes".into());
    store.put_container(&container).await.unwrap();
    closed(store).await;

    // And the later one finds what it had written, and what was changed meanwhile.
    let mut db = Connection::open(&path).unwrap();
    migrate(&mut db, &later(migrate::version())).unwrap();
    let found: (i64, i64, String, String) = db
        .query_row(
            "SELECT weight, until, json_extract(record, '$.flavour.a[0]') || '', json_extract(record, '$.state')
             FROM pods JOIN leases ON pod = id WHERE id = ?1",
            [pod.id.as_str()],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )
        .unwrap();
    assert_eq!(found, (3, 99, "1".into(), "NotReady".into()));
    let found: (String, String) = db
        .query_row(
            "SELECT json_extract(record, '$.flavour'), json_extract(record, '$.config.labels.changed')
             FROM containers WHERE id = ?1",
            [container.id.as_str()],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .unwrap();
    assert_eq!(found, ("sweet".into(), "yes".into()));
    let kept: String = db
        .query_row("SELECT record FROM pods WHERE id = 'unreadable'", [], |row| row.get(0))
        .unwrap();
    assert_eq!(kept, r#"{"state":"Dormant"}"#);
}

#[tokio::test]
async fn what_a_later_release_forbids_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = fixture(dir.path(), FIXTURES[1].1);
    let found = migrate::version() + 1;
    let mut db = Connection::open(&path).unwrap();
    migrate(&mut db, &later(found)).unwrap();
    drop(db);
    let before = std::fs::read(&path).unwrap();
    let opened = Store::open_with_copies(&path, &dir.path().join("b"), &dir.path().join("i"));
    let error = opened.err().unwrap().to_string();
    for words in [&*format!("schema {found}"), "install that release again", "made anew"] {
        assert!(error.contains(words), "{error}");
    }
    let db = Connection::open(&path).unwrap();
    assert_eq!(migrate::found(&db).unwrap(), found);
    // WAL or not is all that opening it changed.
    let rows: i64 = db.query_row("SELECT count(*) FROM pods", [], |row| row.get(0)).unwrap();
    assert_eq!((rows, before.len()), (2, std::fs::read(&path).unwrap().len()));
    let aside = std::fs::read_dir(dir.path()).unwrap().flatten();
    assert!(!aside.into_iter().any(|e| e.file_name().to_string_lossy().contains("broken")));
}

/// The daemon before this release skips the migrations that it does not know, and writes rows without a
/// revision.
#[tokio::test]
async fn the_release_before_can_go_on_with_it_and_its_writes_count() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holdfast.db");
    let (bundles, images) = (dir.path().join("bundles"), dir.path().join("images"));
    let open = || Store::open_with_copies(&path, &bundles, &images).unwrap();
    Connection::open(&path).unwrap().execute_batch(FIXTURES[0].1).unwrap();
    let store = open();
    let (pods, _) = store.load().await.unwrap();
    for pod in &pods {
        std::fs::create_dir_all(bundles.join(&pod.id)).unwrap();
        store.put_pod(pod).await.unwrap();
    }
    let stored = store.load_images().await.unwrap();
    let id: Digest = stored.images[0].id.parse().unwrap();
    closed(store).await;
    // As its statements were.
    Connection::open(&path)
        .unwrap()
        .execute_batch(
            r#"INSERT INTO pods (id, record)
               SELECT id, json_set(record, '$.state', 'NotReady') FROM pods WHERE 1
               ON CONFLICT (id) DO UPDATE SET record = excluded.record;
               DELETE FROM image_names WHERE name LIKE '%:stable';"#,
        )
        .unwrap();
    let store = open();
    assert_eq!(store.opening().damage, None);
    let (pods, _) = store.load().await.unwrap();
    assert!(pods.iter().all(|pod| pod.state == PodState::NotReady));
    assert_eq!(store.load_images().await.unwrap().images[0].names.len(), 2);
    store.copy_missing().await.unwrap();
    let copy: copies::ImageCopy = copies::read(&images.join(format!("{}.json", id.hex()))).unwrap();
    assert_eq!(copy.names.len(), 2);
    closed(store).await;
    Connection::open(&path).unwrap().execute_batch("DELETE FROM images").unwrap();
    let store = open();
    assert_eq!((&store.opening().damage, store.opening().restored), (&None, Restored::default()));
    assert!(store.load_images().await.unwrap().images.is_empty());
    assert!(!images.join(format!("{}.json", id.hex())).exists());
    for pod in &pods {
        let copy: BundleCopy = copies::read(&bundles.join(&pod.id).join("record.json")).unwrap();
        assert_eq!(copy.pod.unwrap()["state"], "NotReady");
    }
}

use copies::BundleCopy;

/// A store with the content of a fixture, bundles for all of it and copies of everything.
struct Copied {
    dir: tempfile::TempDir,
}

impl Copied {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let copied = Self { dir };
        Connection::open(copied.db()).unwrap().execute_batch(FIXTURES[0].1).unwrap();
        let store = copied.open();
        let (pods, containers) = store.load().await.unwrap();
        for id in pods.iter().map(|p| p.id.as_str()).chain(containers.iter().map(|c| c.id.as_str()))
        {
            std::fs::create_dir_all(copied.bundles().join(id)).unwrap();
        }
        closed(store).await;
        let store = copied.open();
        store.copy_missing().await.unwrap();
        closed(store).await;
        copied
    }
    fn db(&self) -> PathBuf {
        self.dir.path().join("holdfast.db")
    }
    fn wal(&self) -> PathBuf {
        self.dir.path().join("holdfast.db-wal")
    }
    fn bundles(&self) -> PathBuf {
        self.dir.path().join("bundles")
    }
    fn open(&self) -> Store {
        Store::open_with_copies(&self.db(), &self.bundles(), &self.dir.path().join("images"))
            .unwrap()
    }
    /// Opens it after some damage; all of it is there again.
    async fn rebuilt(&self, how: &str) -> Opening {
        let store = self.open();
        let opening = store.opening().clone();
        assert!(opening.damage.is_some(), "{how}");
        assert_eq!(
            opening.restored,
            Restored { pods: 2, containers: 3, images: 1 },
            "{how}: {}",
            opening.summary()
        );
        assert!(opening.verify, "{how}");
        assert_is_the_fixture(&store).await;
        store.verified().await.unwrap();
        closed(store).await;
        let store = self.open();
        assert_eq!(store.opening().damage, None, "{how}: the next time all is well");
        assert!(!store.opening().verify, "{how}");
        closed(store).await;
        opening
    }
}

#[tokio::test]
async fn whatever_becomes_of_the_file_all_comes_back_and_the_file_is_kept() {
    let copied = Copied::new().await;
    let whole = std::fs::read(copied.db()).unwrap();
    assert!(whole.len() > 8 * 4096);
    type Damage<'a> = (&'a str, bool, Box<dyn Fn() + 'a>);
    let write = |bytes: Vec<u8>| {
        let at = copied.db();
        move || std::fs::write(&at, &bytes).unwrap()
    };
    let mut flipped = whole.clone();
    for byte in &mut flipped[5 * 4096..7 * 4096] {
        *byte = !*byte;
    }
    let mut headless = whole.clone();
    headless[..100].fill(0);
    let strange = copied.dir.path().join("strange");
    Connection::open(&strange).unwrap().execute_batch("CREATE TABLE songs (title)").unwrap();
    let strange = std::fs::read(&strange).unwrap();
    let bare = copied.dir.path().join("bare");
    Connection::open(&bare)
        .unwrap()
        .execute_batch("CREATE TABLE pods (id, record); PRAGMA user_version = 2")
        .unwrap();
    let bare = std::fs::read(&bare).unwrap();
    let damages: Vec<Damage<'_>> = vec![
        ("garbage", true, Box::new(write(b"not a database at all".repeat(1000)))),
        ("half of it", true, Box::new(write(whole[..whole.len() / 2].to_vec()))),
        ("pages of noise", true, Box::new(write(flipped))),
        ("no head", true, Box::new(write(headless))),
        ("another program's", true, Box::new(write(strange))),
        ("tables are missing", true, Box::new(write(bare))),
        ("empty", false, Box::new(write(Vec::new()))),
        ("gone", false, Box::new(|| std::fs::remove_file(copied.db()).unwrap())),
        (
            "gone, but not its log",
            true,
            Box::new(|| {
                std::fs::remove_file(copied.db()).unwrap();
                std::fs::write(copied.wal(), "log").unwrap();
            }),
        ),
    ];
    for (how, kept, damage) in damages {
        let _ = std::fs::remove_file(copied.wal());
        damage();
        let opening = copied.rebuilt(how).await;
        let found = opening.damage.unwrap();
        assert_eq!(!found.kept.is_empty(), kept, "{how}: {found:?}");
        assert!(found.kept.iter().all(|path| path.exists()), "{how}: {found:?}");
        assert!(!found.what.is_empty());
    }
}

/// A database without its log is whole, and old.
#[tokio::test]
async fn what_was_only_in_a_log_that_is_gone_comes_back() {
    let copied = Copied::new().await;
    let store = copied.open();
    let (mut pods, containers) = store.load().await.unwrap();
    // What follows is in the log alone, for it is never copied back while the store is open.
    let pod = pods.iter_mut().find(|pod| pod.config.name == "web").unwrap();
    pod.config.annotations.insert("late".into(), "yes".into());
    store.put_pod(pod).await.unwrap();
    let mut new = PodRecord { id: PodId::random(), ..pod.clone() };
    new.config.name = "new".into();
    std::fs::create_dir(copied.bundles().join(&new.id)).unwrap();
    store.put_pod(&new).await.unwrap();
    let mut container = ContainerRecord { id: ContainerId::random(), ..containers[0].clone() };
    container.config.name = "late".into();
    std::fs::create_dir(copied.bundles().join(&container.id)).unwrap();
    let stored = store.load_images().await.unwrap();
    let image: Digest = stored.images[0].id.parse().unwrap();
    store.add_snapshot(&container.id, &image, vec![2, 3]).await.unwrap();
    store.add_image_volume(&container.id, 0, &image, vec![2]).await.unwrap();
    store.put_container(&container).await.unwrap();
    store.add_image_name(&image, "registry.example/app:late", "").await.unwrap();
    let old = std::fs::read(copied.db()).unwrap();
    closed(store).await;
    std::fs::write(copied.db(), old).unwrap();
    let _ = std::fs::remove_file(copied.wal());

    let store = copied.open();
    let opening = store.opening();
    assert_eq!(opening.restored, Restored { pods: 2, containers: 1, images: 1 });
    assert!(opening.damage.as_ref().unwrap().what.contains("lost what was written last"));
    let (pods, containers) = store.load().await.unwrap();
    assert_eq!((pods.len(), containers.len()), (3, 4));
    assert!(pods.iter().filter(|pod| pod.config.annotations.contains_key("late")).count() == 2);
    let stored = store.load_images().await.unwrap();
    assert!(stored.images[0].names.iter().any(|(name, _)| name.ends_with(":late")));
    let held: Vec<_> = stored
        .snapshots
        .iter()
        .filter(|snapshot| snapshot.container.starts_with(container.id.as_str()))
        .map(|snapshot| snapshot.layers.clone())
        .collect();
    assert_eq!(held, [vec![2, 3], vec![2]]);
}

/// Its frames are good ones, and say what is not so here.
#[tokio::test]
async fn the_log_of_another_node_does_no_harm() {
    let (here, there) = (Copied::new().await, Copied::new().await);
    let store = there.open();
    let (pods, _) = store.load().await.unwrap();
    for pod in &pods {
        store.delete_pod(&pod.id).await.unwrap();
    }
    let log = std::fs::read(there.wal()).unwrap();
    drop(store);
    std::fs::write(here.wal(), log).unwrap();
    let store = here.open();
    assert_is_the_fixture(&store).await;
    assert!(store.opening().damage.is_some());
}

#[tokio::test]
async fn a_record_that_cannot_be_read_comes_back_from_its_copy() {
    let copied = Copied::new().await;
    let db = Connection::open(copied.db()).unwrap();
    db.execute_batch("UPDATE pods SET record = '{'; UPDATE containers SET record = 'null'")
        .unwrap();
    drop(db);
    let store = copied.open();
    assert_eq!(store.opening().restored, Restored { pods: 2, containers: 3, images: 0 });
    assert_is_the_fixture(&store).await;
}

#[tokio::test]
async fn what_was_removed_does_not_come_back() {
    let copied = Copied::new().await;
    let store = copied.open();
    let (pods, containers) = store.load().await.unwrap();
    // As a pod's removal does: bundles first.
    for id in pods.iter().map(|p| p.id.as_str()).chain(containers.iter().map(|c| c.id.as_str())) {
        std::fs::remove_dir_all(copied.bundles().join(id)).unwrap();
    }
    let image = store.load_images().await.unwrap().images[0].id.parse().unwrap();
    store.remove_image(&image).await.unwrap();
    closed(store).await;
    std::fs::remove_file(copied.db()).unwrap();
    let _ = std::fs::remove_file(copied.wal());
    let store = copied.open();
    assert_eq!(store.opening().restored, Restored::default());
    assert!(store.load().await.unwrap().0.is_empty());
    assert!(store.load_images().await.unwrap().images.is_empty());
}

/// A name goes from one image to another, and a crash comes between the two copies.
#[tokio::test]
async fn of_two_copies_that_claim_a_name_the_later_one_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (db, images) = (dir.path().join("db"), dir.path().join("images"));
    let open = || Store::open_with_copies(&db, &dir.path().join("bundles"), &images).unwrap();
    let store = open();
    let digest = |n: u8| Digest::from_sha256([n; 32]);
    let layer = |number| LayerRecord {
        number,
        diff_id: digest(number as u8).to_string(),
        chain: String::new(),
        bytes: 1,
        inodes: 1,
        root_listed: false,
    };
    let add = async |n: u8, name: &str| {
        let (record, names) = (ImageRecord::default(), vec![(name.to_owned(), String::new())]);
        let config = b"{}".to_vec();
        store.add_image(&digest(n), record, Vec::new(), config, vec![layer(n.into())], names).await
    };
    add(1, "a:1").await.unwrap();
    let old = images.join(format!("{}.json", digest(1).hex()));
    let before = std::fs::read(&old).unwrap();
    add(2, "b:1").await.unwrap();
    add(2, "a:1").await.unwrap();
    closed(store).await;
    std::fs::write(&old, before).unwrap();
    std::fs::remove_file(&db).unwrap();
    let store = open();
    let stored = store.load_images().await.unwrap();
    let names = |n: u8| {
        let image = stored.images.iter().find(|image| image.id == digest(n).to_string()).unwrap();
        image.names.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    assert_eq!((names(1), names(2)), (vec![], vec!["a:1".into(), "b:1".into()]));
}

#[test]
fn what_is_wrong_is_told_apart() {
    let mut db = Connection::open_in_memory().unwrap();
    db.execute_batch("PRAGMA user_version = 9; CREATE TABLE t (x)").unwrap();
    assert!(matches!(migrate(&mut db, MIGRATIONS), Err(Unusable::Strange(_))));
    db.execute_batch("CREATE TABLE pods (id)").unwrap();
    let refused = migrate(&mut db, MIGRATIONS);
    assert!(matches!(refused, Err(Unusable::Newer { found: 9, oldest: 9 })), "{refused:?}");
}
