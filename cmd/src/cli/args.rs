//! The command line's grammar.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};

use super::{detach, text};

const DEFAULT_SOCKET: &str = "/run/holdfast/holdfast.sock";

const DETACH_KEYS: &str = "ctrl-p,ctrl-q";

// clap has no groups of subcommands: this is the list, and a test keeps it complete.
const HELP: &str = "\
{about}

{usage-heading} {usage}

Pods and containers:
  run           Run an image's container in a new pod
  ps            List containers
  pods          List pods
  logs          Print a container's log
  exec          Run a command in a container
  attach        Join a container that runs
  port-forward  Forward ports of this node to a pod
  checkpoint    Write a container's state to an archive
  stop          Stop containers or pods
  rm            Remove containers or pods
  stats         Show what containers use

Images:
  images        List images
  pull          Pull an image
  rmi           Remove images
  commit        Make an image of what a container has changed
  image         push, save, load, tag, prune; ls, pull, rm, inspect

About:
  inspect       Print everything about a pod, container or image
  config        Look at what the daemon's configuration makes of something
  info          Show what the daemon can do and whether it is ready
  version       Print the versions of holdfast and holdfastd
  upgrade       Bring what runs to a new release
  completion    Print a completion script for a shell
  help          Print the help of a command

Options:
{options}

Examples:
  holdfast run --rm docker.io/library/busybox:1.36 echo hello
  holdfast run -it --rm docker.io/library/busybox:1.36 sh
  holdfast run -d --name web -p 8080:80 registry.example/nginx:1
  holdfast logs -f --tail 20 web
  holdfast exec -it web sh
  holdfast port-forward web 8080:80
  holdfast ps -o json | jq -r '.containers[].id'
  holdfast rm -f web

A NAME is a name, an id, or the beginning of an id. Tables are for people; for programs use -o json.
";

/// Run and look at pods, containers and images on this node.
#[derive(Debug, Parser)]
#[command(
    name = "holdfast",
    version,
    max_term_width = 100,
    help_template = HELP,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, clap::Args)]
pub(super) struct Global {
    /// The daemon's socket
    #[arg(
        long,
        global = true,
        env = "HOLDFAST_ADDRESS",
        default_value = DEFAULT_SOCKET,
        hide_env_values = true,
        value_name = "SOCKET",
        display_order = 900
    )]
    pub(super) address: String,
    /// Give up waiting for an answer after this long [default: as long as the command may need]
    #[arg(long, global = true, value_name = "DURATION", value_parser = text::parse_duration, display_order = 901)]
    pub(super) timeout: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run an image's container in a new pod
    Run(Box<Run>),
    /// List containers
    Ps(Ps),
    /// List pods
    Pods(Pods),
    /// Print a container's log
    Logs(Logs),
    /// Run a command in a container
    Exec(Exec),
    /// Join a container that runs
    Attach(Attach),
    /// Forward ports of this node to a pod
    PortForward(PortForward),
    /// Write a container's state to an archive
    Checkpoint(Checkpoint),
    /// Stop containers or pods
    Stop(Stop),
    /// Remove containers or pods
    Rm(Rm),
    /// Show what containers use
    Stats(Stats),
    /// List images
    Images(Images),
    /// Pull an image
    Pull(Pull),
    /// Remove images
    Rmi(Rmi),
    /// Make an image of what a container has changed
    Commit(Commit),
    /// Work with images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Print everything about a pod, container or image
    Inspect(Inspect),
    /// Look at what the daemon's configuration makes of something
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Bring what runs to a new release
    #[command(subcommand)]
    Upgrade(UpgradeCommand),
    /// Show what the daemon can do and whether it is ready
    Info(Show),
    /// Print the versions of holdfast and holdfastd
    Version(Show),
    /// Print a completion script for a shell
    #[command(after_help = "For bash: holdfast completion bash > /etc/bash_completion.d/holdfast")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum UpgradeCommand {
    /// Replace the code of running shims; their pods go on
    #[command(
        after_help = "A shim that cannot take the new code goes on with what it has, and the \
                            command ends with 1."
    )]
    Shims(UpgradeShims),
}

#[derive(Debug, clap::Args)]
pub(super) struct UpgradeShims {
    /// The new shim on the node [default: the one of the daemon's configuration]
    #[arg(long, value_name = "PATH")]
    pub(super) binary: Option<std::path::PathBuf>,
    /// Also shims that run that very file already
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// List images (holdfast images)
    Ls(Images),
    /// Pull an image (holdfast pull)
    Pull(Pull),
    /// Send an image to a registry
    Push(Push),
    /// Write an archive of images: an OCI layout, or what `docker load` reads
    Save(Save),
    /// Import the images of an archive: an OCI layout, or what `docker save` writes
    #[command(visible_alias = "load")]
    Import(Import),
    /// Give an image one more name
    Tag(Tag),
    /// Remove images (holdfast rmi)
    Rm(Rmi),
    /// Remove images that no container uses
    Prune(Prune),
    /// Print everything about images
    Inspect(InspectImages),
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print which servers are asked for an image, in order, and the file that names each
    Registries(Registries),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Nothing is asked over the network. The files are images.registries_conf with its drop-ins, and the \
hosts.toml of each registry in images.hosts_dir. Exit code 1: no server would be asked.")]
pub(super) struct Registries {
    /// How to print it
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Shown,
    /// An image's name, as in `holdfast pull`
    pub(super) image: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    #[default]
    Table,
    Json,
    Yaml,
    Name,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Document {
    #[default]
    Json,
    Yaml,
}

#[derive(Debug, clap::Args)]
pub(super) struct Listing {
    /// A table for people, the CRI's messages as proto3 JSON or YAML, or ids only
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Only ids, one a line: the same as -o name
    #[arg(long, short, conflicts_with = "output")]
    quiet: bool,
    /// Full ids
    #[arg(long)]
    pub(super) no_trunc: bool,
}

impl Listing {
    pub(super) fn output(&self) -> Output {
        if self.quiet { Output::Name } else { self.output }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Pods {
    #[command(flatten)]
    pub(super) listing: Listing,
    /// Only pods of this Kubernetes namespace
    #[arg(long, short, value_name = "NAMESPACE")]
    pub(super) namespace: Option<String>,
    /// Only pods with this label; may be given more than once
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = text::parse_key_value)]
    pub(super) label: Vec<(String, String)>,
    /// Only pods that are ready
    #[arg(long)]
    pub(super) ready: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Ps {
    #[command(flatten)]
    pub(super) listing: Listing,
    /// Containers that are not running too
    #[arg(long, short)]
    pub(super) all: bool,
    /// Only containers of this pod
    #[arg(long, short, value_name = "NAME")]
    pub(super) pod: Option<String>,
    /// Only containers with this label; may be given more than once
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = text::parse_key_value)]
    pub(super) label: Vec<(String, String)>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Images {
    #[command(flatten)]
    pub(super) listing: Listing,
    /// Digests too
    #[arg(long)]
    pub(super) digests: bool,
    /// Only this image
    #[arg(value_name = "IMAGE")]
    pub(super) filter: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The password is read from HOLDFAST_PASSWORD, or from stdin with --password-stdin; as part of -u it is \
seen by everybody who can list processes.")]
pub(super) struct Pull {
    #[command(flatten)]
    pub(super) registry: Registry,
    /// Only the image's id, no progress
    #[arg(long, short)]
    pub(super) quiet: bool,
    /// For another platform than the node's own
    #[arg(long, value_name = "OS/ARCH", default_value = "", hide_default_value = true)]
    pub(super) platform: String,
    /// What to pull: registry/name:tag or registry/name@sha256:...
    pub(super) image: String,
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Registry {
    /// Who to be at the registry
    #[arg(long = "user", short = 'u', value_name = "USER[:PASSWORD]")]
    pub(super) credentials: Option<String>,
    /// Read the password from stdin
    #[arg(long, requires = "credentials")]
    pub(super) password_stdin: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Layers that the registry has, or can take over from another of its repositories, are not sent. Others are \
compressed anew: the image's id stays, the digest of its manifest may change. The password is read from \
HOLDFAST_PASSWORD, or from stdin with --password-stdin. Ctrl-C ends the push.")]
pub(super) struct Push {
    #[command(flatten)]
    pub(super) registry: Registry,
    /// Only the digest, no progress
    #[arg(long, short)]
    pub(super) quiet: bool,
    /// The image by name, digest, id, or the beginning of an id
    pub(super) image: String,
    /// As what it is pushed [default: the name by which it is given]
    #[arg(value_name = "AS", default_value = "", hide_default_value = true)]
    pub(super) name: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
An image that is given by a tag has that name in the archive; one that is given by its id has all of them. \
Layers are compressed in `oci`, and not in `docker`. The same image is always the same archive.")]
pub(super) struct Save {
    /// Where to; - for stdout
    #[arg(long, short, value_name = "FILE", default_value = "-", hide_default_value = true)]
    pub(super) output: PathBuf,
    /// An OCI layout, or what `docker load` of every version reads
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) format: ArchiveFormat,
    /// Images by name, digest, id, or the beginning of an id
    #[arg(required = true, value_name = "IMAGE")]
    pub(super) images: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ArchiveFormat {
    #[default]
    Oci,
    Docker,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Volumes and mounts are not part of it. The container goes on: for files that belong together, stop it first.")]
pub(super) struct Commit {
    /// Who made it
    #[arg(long, short, default_value = "", hide_default_value = true)]
    pub(super) author: String,
    /// Why
    #[arg(long, short, default_value = "", hide_default_value = true)]
    pub(super) message: String,
    /// A container, or a pod that has only one
    #[arg(value_name = "NAME")]
    pub(super) container: String,
    /// The name that the image gets
    pub(super) image: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Tag {
    /// The image by name, digest, id, or the beginning of an id
    pub(super) image: String,
    /// The name that it gets; another image that has it loses it
    pub(super) name: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints what was removed. Images that are pinned stay. A kubelet collects images by itself; this is for nodes \
that need room now.")]
pub(super) struct Prune {
    /// Images with a tag too
    #[arg(long, short)]
    pub(super) all: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A tag or a digest takes that name from its image, which goes with the last of its tags; an id removes the \
image. One that a container uses goes from all lists, and its layers with the container.")]
pub(super) struct Rmi {
    /// Images by name, digest, id, or the beginning of an id
    #[arg(required = true, value_name = "IMAGE")]
    pub(super) images: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// A name for an image that has none in the archive
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) name: String,
    /// The archive, which may be compressed; - for stdin
    #[arg(default_value = "-", hide_default_value = true)]
    pub(super) file: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// How to print it
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Document,
    /// What the names are of [default: a pod, else a container, else an image]
    #[arg(long = "type", short = 't', value_enum, value_name = "TYPE")]
    pub(super) kind: Option<Kind>,
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub(super) names: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct InspectImages {
    /// How to print it
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Document,
    /// Images by name, digest, id, or the beginning of an id
    #[arg(required = true, value_name = "IMAGE")]
    pub(super) images: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    Pod,
    Container,
    Image,
}

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    /// How to print it
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Shown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Shown {
    #[default]
    Text,
    Json,
    Yaml,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The container runs on. It needs criu on this node. `holdfast run ARCHIVE` makes a container of it again. With \
--timeout it is given up when the time is up.")]
pub(super) struct Checkpoint {
    /// All containers of a pod, to a directory
    #[arg(long)]
    pub(super) pod: bool,
    /// Where to: a file of this node; with --pod a directory
    #[arg(long, short, value_name = "PATH")]
    pub(super) export: PathBuf,
    /// A container, or a pod that has only one; with --pod a pod
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Stop {
    /// Seconds to wait before a container is killed
    #[arg(long, short, default_value_t = 10, value_name = "SECONDS")]
    pub(super) time: u32,
    /// Pods and containers
    #[arg(required = true, value_name = "NAME")]
    pub(super) names: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Rm {
    /// Running ones too: they are killed
    #[arg(long, short)]
    pub(super) force: bool,
    /// Pods and containers
    #[arg(required = true, value_name = "NAME")]
    pub(super) names: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The exit code is the command's; 125 if it was not run. With -t, stdout has the command's stderr too. With \
--timeout, and without -i and -t, the command is killed when the time is up.")]
pub(super) struct Exec {
    /// Give the command this stdin
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Give the command a terminal: -it for a shell
    #[arg(long, short)]
    pub(super) tty: bool,
    /// A container, or a pod that has only one
    #[arg(value_name = "NAME")]
    pub(super) name: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
What the container prints from now on is shown; see `holdfast logs` for what it printed before. The exit \
code is the container's; 125 if it is not known. Ctrl-C, where it is not the container's own, ends \
holdfast and not the container.")]
pub(super) struct Attach {
    /// Give the container this stdin, if it was made to take one (run -i)
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Keys that leave the container's terminal, and let it run on; "" for none
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS, value_parser = detach::parse_keys)]
    pub(super) detach_keys: detach::Keys,
    /// A container, or a pod that has only one
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each port that is listened on is printed once, as ADDRESS:LOCAL -> REMOTE. The pod's programs see a \
connection to 127.0.0.1. Ctrl-C ends it.")]
pub(super) struct PortForward {
    /// The pod
    #[arg(value_name = "POD")]
    pub(super) pod: String,
    /// A port of this node, or 0 for any that is free, and the pod's; just PORT is PORT:PORT
    #[arg(required = true, value_name = "[ADDRESS:]LOCAL:REMOTE", value_parser = text::parse_forward)]
    pub(super) ports: Vec<text::Forward>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
What the container wrote to stdout goes to stdout, the rest to stderr.")]
pub(super) struct Logs {
    /// Go on until the container has exited
    #[arg(long, short)]
    pub(super) follow: bool,
    /// Only the last lines
    #[arg(long, short = 'n', value_name = "LINES")]
    pub(super) tail: Option<usize>,
    /// Only lines since then: "10m", or "2024-05-01T12:00:00Z"
    #[arg(long, value_name = "WHEN", value_parser = text::parse_since)]
    pub(super) since: Option<jiff::Timestamp>,
    /// When each line was written
    #[arg(long, short)]
    pub(super) timestamps: bool,
    /// Of the container before the last restart
    #[arg(long, short, conflicts_with = "follow")]
    pub(super) previous: bool,
    /// A container, or a pod that has only one
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Stats {
    #[command(flatten)]
    pub(super) listing: Listing,
    /// Once, not again and again (as it is when stdout is not a terminal)
    #[arg(long)]
    pub(super) no_stream: bool,
    /// Pods and containers [default: all that run]
    #[arg(value_name = "NAME")]
    pub(super) names: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Net {
    #[default]
    Pod,
    Host,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum PullPolicy {
    #[default]
    Missing,
    Always,
    Never,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without -d, run prints the container's log until it exits and returns its exit code; 125 if it was not \
started. Ctrl-C stops the container. Without --rm the pod stays, stopped: see its log with `holdfast \
logs`, and remove it with `holdfast rm`. When anything fails on the way, nothing stays.

With -i and -t this is the container's stdin and terminal, and Ctrl-C is a key like any other. The detach \
keys leave the container running, --rm or not: `holdfast attach` gets back to it.

A kubelet on this node removes pods that it does not know.")]
pub(super) struct Run {
    /// Print the pod's id and leave the container running
    #[arg(long, short, conflicts_with = "rm")]
    pub(super) detach: bool,
    /// Remove the pod when the container has exited
    #[arg(long)]
    pub(super) rm: bool,
    /// Give the container this stdin; with -d, keep one for attach
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Give the container a terminal: -it for a shell
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Keys that leave the container's terminal, and let it run on; "" for none
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS, value_parser = detach::parse_keys)]
    pub(super) detach_keys: detach::Keys,
    /// Name of the pod and of its container [default: the image's, and some letters]
    #[arg(long, value_parser = text::parse_pod_name)]
    pub(super) name: Option<String>,
    /// An environment variable; without a value, the one that holdfast has
    #[arg(long, short, value_name = "KEY[=VALUE]", value_parser = text::parse_env)]
    pub(super) env: Vec<(String, String)>,
    /// A directory or file of the node. OPTIONS: ro, rw, rshared, rslave, rprivate, separated by commas
    #[arg(long, short, value_name = "HOST:CONTAINER[:OPTIONS]", value_parser = text::parse_volume)]
    pub(super) volume: Vec<text::Volume>,
    /// A port of the node that leads to a port of the pod
    #[arg(long, short, value_name = "[ADDRESS:]HOST:CONTAINER[/tcp|udp|sctp]", value_parser = text::parse_port)]
    pub(super) publish: Vec<text::Port>,
    /// The pod's own network, by CNI, or the node's
    #[arg(long, value_enum, default_value_t)]
    pub(super) net: Net,
    /// At most this much memory: "64MiB", "1GiB", "512m"
    #[arg(long, value_name = "SIZE", value_parser = text::parse_size)]
    pub(super) memory: Option<u64>,
    /// At most this many CPUs: "0.5", "2"
    #[arg(long, value_name = "NUMBER", value_parser = text::parse_cpus)]
    pub(super) cpus: Option<text::Cpus>,
    /// Everything the node has: all devices and capabilities
    #[arg(long)]
    pub(super) privileged: bool,
    /// Who the container runs as: "1000", "1000:1000", "nobody"
    #[arg(long, value_name = "USER[:GID]", value_parser = text::parse_user)]
    pub(super) user: Option<text::User>,
    /// Who to be at the registry, if the image is pulled; the password may be in HOLDFAST_PASSWORD
    #[arg(long, value_name = "USER[:PASSWORD]")]
    pub(super) registry_user: Option<String>,
    /// Working directory
    #[arg(long, short, value_name = "PATH", default_value = "", hide_default_value = true)]
    pub(super) workdir: String,
    /// Instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(super) entrypoint: Option<String>,
    /// The container cannot write to its root file system
    #[arg(long)]
    pub(super) read_only: bool,
    /// A label of the pod and of its container
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = text::parse_key_value)]
    pub(super) label: Vec<(String, String)>,
    /// Runtime handler, as in a RuntimeClass [default: the daemon's]
    #[arg(long, value_name = "HANDLER", default_value = "", hide_default_value = true)]
    pub(super) runtime: String,
    /// Where the log is kept [default: a directory in /var/log/holdfast]
    #[arg(long, value_name = "DIRECTORY")]
    pub(super) log_dir: Option<PathBuf>,
    /// Pull the image if the node does not have it, every time, or not at all
    #[arg(long, value_enum, default_value_t)]
    pub(super) pull: PullPolicy,
    /// The image
    pub(super) image: String,
    /// Instead of the image's command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("holdfast").chain(line.split_whitespace());
        Args::try_parse_from(words).map(|a| a.command).map_err(|e| e.to_string())
    }

    #[test]
    fn the_grammar_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_help_lists_every_command_with_its_own_words() {
        let mut command = Args::command();
        let help = command.render_help().to_string();
        for sub in command.get_subcommands() {
            let lists = help.lines().any(|line| {
                let mut words = line.split_whitespace();
                line.starts_with("  ") && words.next() == Some(sub.get_name())
            });
            assert!(lists, "{} is not in the help", sub.get_name());
            let about = sub.get_about().unwrap().to_string();
            let other_words = ["image", "help"].contains(&sub.get_name());
            assert!(other_words || help.contains(&about), "{about}");
        }
        assert!(!help.contains('{'), "{help}");
        assert!(help.lines().all(|l| l.chars().count() <= 100), "{help}");
    }

    #[test]
    fn the_manual_has_a_row_for_every_command() {
        let manual = include_str!("../../../docs/cli.md");
        let missing = |name: &str| !manual.contains(&format!("| `{name}"));
        for sub in Args::command().get_subcommands() {
            let name = sub.get_name();
            if sub.has_subcommands() {
                for verb in sub.get_subcommands() {
                    // Those that are commands of their own too have their row there.
                    let both = format!("{name} {}", verb.get_name());
                    let told = manual.contains(&format!("lso `{both}`"));
                    assert!(!missing(&both) || told, "{both} is not in docs/cli.md");
                }
            } else {
                assert!(!missing(name), "{name} is not in docs/cli.md");
            }
        }
    }

    #[test]
    fn what_follows_the_image_is_the_command() {
        let Ok(Command::Run(run)) = parse("run --rm -e A=b -p 80:80 busybox ls -l --name x") else {
            panic!()
        };
        assert!(run.rm && run.name.is_none());
        assert_eq!(run.image, "busybox");
        assert_eq!(run.command, ["ls", "-l", "--name", "x"]);
        assert_eq!(run.env, [("A".to_owned(), "b".to_owned())]);
    }

    #[test]
    fn exec_takes_a_command_with_and_without_dashes() {
        for line in ["exec web ls -l", "exec web -- ls -l"] {
            let Ok(Command::Exec(exec)) = parse(line) else { panic!("{line}") };
            assert_eq!(
                (exec.name.as_str(), &*exec.command),
                ("web", &["ls".into(), "-l".into()][..])
            );
        }
        assert!(parse("exec web").is_err());
    }

    #[test]
    fn wrong_lines_are_refused_with_the_reason() {
        for (line, expected) in [
            ("run -d --rm busybox", "cannot be used with"),
            ("run --name a/b busybox", "lower-case"),
            ("run -p 80 busybox", "HOST:CONTAINER"),
            ("run -v relative busybox", "HOST:CONTAINER"),
            ("run --memory lots busybox", "64MiB"),
            ("run --cpus 0 busybox", "more than 0"),
            ("run", "<IMAGE>"),
            ("logs", "<NAME>"),
            ("logs --since yesterday web", "10m"),
            ("ps -q -o json", "cannot be used with"),
            ("stop", "<NAME>"),
            ("ps --timeout 5", "30s"),
            ("attach --detach-keys alt-p web", "ctrl-p,ctrl-q"),
            ("run --detach-keys ctrl-1 busybox", "ctrl-p,ctrl-q"),
            ("port-forward web", "LOCAL:REMOTE"),
            ("port-forward web 80:0", "1 to 65535"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
