//! Power cuts: what is recorded is whole, whenever the power goes.
//!
//! The store of images is on a file system of its own in a file, which is on another file system. That
//! one is frozen at random moments, while images are pulled and removed, and the file copied: what a
//! disk would hold that had lost power then. The copy is mounted (the kernel replays its journal), and
//! each image that it knows must give back every layer's archive with the right digest, so all content
//! is read. Freezing does not sync the store's own file system: what was not written through is not in
//! the copy.
//!
//! `HOLDFAST_POWER_CUTS` is how often (default 10; `make power-cuts` cuts 200 times).

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_daemon::{config::Config, image::Images, store::Store};
use holdfast_integration::{Image, Registry, tar::Entry};
use nix::unistd::Whence;
use rand::Rng as _;

/// Size of the store's file system.
const SIZE: u64 = 384 << 20;

/// A mount that goes with it.
struct Mount(PathBuf);

impl Mount {
    fn of(image: &Path, at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        run("mount", &["-o", "loop", text(image), text(at)])?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = run("umount", &[text(&self.0)]).or_else(|_| run("umount", &["-l", text(&self.0)]));
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("run {program}"))?;
    ensure!(output.status.success(), "{program} {arguments:?}: {output:?}");
    Ok(())
}

/// A new ext4 in a file.
fn file_system(path: &Path, size: u64) -> Result<()> {
    File::create_new(path)?.set_len(size)?;
    // A small journal is used up sooner, and its replay is part of what is tried.
    run("mkfs.ext4", &["-q", "-F", "-J", "size=16", text(path)])
}

/// Keeps a file system from taking writes, until it is dropped.
struct Frozen(File);

impl Frozen {
    #[expect(unsafe_code, reason = "FIFREEZE")]
    fn new(at: &Path) -> Result<Self> {
        let directory = File::open(at)?;
        // SAFETY: the call takes no argument (ioctl_fifreeze(2)).
        let result =
            unsafe { libc::ioctl(directory.as_raw_fd(), 0xc004_5877_u32 as libc::Ioctl, 0) };
        ensure!(result == 0, "freeze: {}", io::Error::last_os_error());
        Ok(Self(directory))
    }
}

impl Drop for Frozen {
    #[expect(unsafe_code, reason = "FITHAW")]
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::ioctl(self.0.as_raw_fd(), 0xc004_5878_u32 as libc::Ioctl, 0) };
    }
}

/// Copies what a file has, and leaves its holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let (mut from, mut to) = (File::open(from)?, File::create(to)?);
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut at = 0i64;
    // ENXIO: no data behind this.
    while let Ok(start) = nix::unistd::lseek(&from, at, Whence::SeekData) {
        let end = nix::unistd::lseek(&from, start, Whence::SeekHole)?;
        from.seek(SeekFrom::Start(start as u64))?;
        to.seek(SeekFrom::Start(start as u64))?;
        io::copy(&mut (&from).take((end - start) as u64), &mut to)?;
        at = end;
    }
    to.flush()?;
    Ok(())
}

async fn open(root: &Path) -> Result<Images> {
    let config = Config::parse(&Config::default_toml(), Path::new("default"))?;
    let store = Store::open(&root.join("db"))?;
    Ok(Images::open(&root.join("images"), config.images, store).await?)
}

/// Every image that is shown is whole; how many there are.
async fn whole(root: &Path, wanted: &str) -> Result<usize> {
    let images = open(root).await?;
    let list = images.list();
    for image in &list {
        for layer in image.hold_layers() {
            let id = format!("{layer:?} of {:?}", image.names);
            tokio::task::spawn_blocking(move || -> Result<()> {
                io::copy(&mut layer.archive()?, &mut io::sink())?;
                Ok(())
            })
            .await?
            .with_context(|| id)?;
        }
    }
    let count = list.len();
    drop(list);
    // And it goes on from there.
    images.pull(wanted, None, None).await.context("pull after the cut")?;
    images.shutdown().await;
    Ok(count)
}

fn layers(seed: usize) -> Vec<Vec<Entry>> {
    (0..4)
        .map(|layer| {
            let top = format!("top{}", seed * 10 + layer);
            let mut entries = vec![Entry::dir(&top, 0o755)];
            for file in 0..60 {
                let size = [100, 5_000, 30_000, 200_000][file % 4];
                let mut content = vec![0; size];
                rand::fill(&mut content[..]);
                entries.push(Entry::file(&format!("{top}/{file}"), 0o644, content));
            }
            entries
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_cut_every_image_is_whole() -> Result<()> {
    let cuts: usize = std::env::var("HOLDFAST_POWER_CUTS").map_or(Ok(10), |n| n.parse())?;
    let registry = Registry::start().await?;
    let mut references = Vec::new();
    for number in 0..3 {
        let mut builder = Image::empty().cmd(["/none"]);
        for layer in layers(number) {
            builder = builder.layer(layer);
        }
        references.push(registry.push(&format!("power/{number}:1"), &builder.build()?).await?);
    }

    let dir = tempfile::Builder::new().prefix("holdfast-power").tempdir_in("/var/tmp")?;
    // The copies are in memory: they take no time from the disk under test.
    let copies = tempfile::Builder::new().prefix("holdfast-power").tempdir_in("/dev/shm")?;
    let outer = dir.path().join("outer");
    file_system(&outer, 2 * SIZE)?;
    let outer = Mount::of(&outer, &dir.path().join("disk"))?;
    let disk = outer.0.join("disk");
    file_system(&disk, SIZE)?;
    let inner = Mount::of(&disk, &dir.path().join("store"))?;
    let root = inner.0.clone();
    fs::create_dir(root.join("images"))?;

    let images = open(&root).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let busy = tokio::spawn({
        let (images, stop, references) = (images.clone(), stop.clone(), references.clone());
        async move {
            let mut pulls = 0;
            while !stop.load(Ordering::Relaxed) {
                for reference in &references {
                    images.pull(reference, None, None).await?;
                    pulls += 1;
                }
                // One stays: there is something to be whole at most moments.
                for reference in &references[1..] {
                    images.remove(reference).await?;
                }
                images.remove(&references[0]).await?;
            }
            Ok::<_, anyhow::Error>(pulls)
        }
    });
    let mut seen = Vec::new();
    for cut in 0..cuts {
        let wait = rand::rng().random_range(0..400);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        ensure!(!busy.is_finished(), "pulls ended before the cut");
        let copied = copies.path().join("disk");
        let (at, disk, to) = (outer.0.clone(), disk.clone(), copied.clone());
        tokio::task::spawn_blocking(move || {
            let frozen = Frozen::new(&at)?;
            let copied = copy(&disk, &to);
            drop(frozen);
            copied
        })
        .await??;
        let mounted = Mount::of(&copied, &copies.path().join("mounted"))?;
        let found = whole(&mounted.0, &references[cut % references.len()]).await;
        seen.push(found.with_context(|| format!("cut {cut}"))?);
        drop(mounted);
        fs::remove_file(&copied)?;
    }
    stop.store(true, Ordering::Relaxed);
    let pulls = busy.await??;
    images.shutdown().await;
    drop(images);
    println!("{cuts} cuts during {pulls} pulls; images found: {seen:?}");
    if seen.iter().all(|count| *count == 0) {
        bail!("no cut found an image: nothing was tried");
    }
    Ok(())
}
