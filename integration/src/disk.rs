//! Small file systems, and what fills them.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, umount2};

/// An ext4 in a file, mounted.
#[derive(Debug)]
pub struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Makes one of so many MiB and mounts it at `ground/directory`. The loop device goes with it.
    pub(crate) fn mount(ground: &Path, directory: &str, mib: u64) -> Result<Self> {
        let at = ground.join(directory);
        fs::create_dir_all(&at)?;
        let image = ground.join(format!("{directory}.ext4"));
        File::create(&image)?.set_len(mib << 20)?;
        // No blocks kept back for root: full is full.
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
        Ok(Self { at })
    }

    pub(crate) fn unmount(self) -> Result<()> {
        umount2(&self.at, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", self.at.display()))
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{:?}: {}: {said}", command.get_program(), output.status);
    Ok(())
}

/// Whether a file in this directory cannot get a single block.
///
/// # Errors
/// It cannot be written for another reason.
pub fn is_full(directory: &Path) -> Result<bool> {
    let path = directory.join("probe");
    let tried = File::create(&path).and_then(|mut file| {
        file.write_all(&[1; 4096])?;
        file.sync_data()
    });
    let _ = fs::remove_file(&path);
    match tried {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(true),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Somebody who takes every byte of a file system, at once and again and again, until dropped.
#[derive(Debug)]
pub struct Hog {
    file: PathBuf,
    over: Arc<AtomicBool>,
    taking: Option<JoinHandle<()>>,
}

impl Hog {
    /// Returns when there is not one byte left in `directory`'s file system.
    ///
    /// # Errors
    /// Its file cannot be made.
    pub fn take_all(directory: &Path) -> Result<Self> {
        let path = directory.join("hog");
        let mut file = File::create(&path)?;
        eat(&mut file)?;
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let taking = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                // What others give back is gone before they can use it.
                let _ = eat(&mut file);
                thread::sleep(Duration::from_millis(2));
            }
        });
        Ok(Self { file: path, over, taking: Some(taking) })
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(taking) = self.taking.take() {
            let _ = taking.join();
        }
        let _ = fs::remove_file(&self.file);
    }
}

/// Writes until nothing more fits.
fn eat(file: &mut File) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    for size in [1 << 20, 4096, 1] {
        loop {
            match file.write(&zeros[..size]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error),
            }
        }
        // ext4 gives blocks out late: only what is on disk is taken.
        match file.sync_data() {
            Err(error) if error.kind() != io::ErrorKind::StorageFull => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
