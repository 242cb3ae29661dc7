//! What a shim costs. Meaningful with the binary that is shipped:
//! `HOLDFAST_TEST_SHIM=<static binary> cargo test … --test shim costs -- --ignored --nocapture`.

use std::{
    fs,
    time::{Duration, Instant},
};

use holdfast_shim::options::PodOptions;

use crate::node::{Node, Oci};

/// A line of smaps_rollup, in KiB.
fn kib(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix(name))
        .map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
        .sum()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[tokio::test]
#[ignore = "a measurement, which needs the machine for itself"]
async fn memory_of_idle_pods_and_times_of_calls() {
    let node = Node::new(Oci::Runc);
    let (mut pods, mut starts, mut creates, mut runs) = (vec![], vec![], vec![], vec![]);
    for n in 0..30 {
        let before = Instant::now();
        let pod = node.shim(&format!("pod{n}")).await;
        starts.push(before.elapsed());
        let own = PodOptions { net: true, ipc: true, uts: true, ..PodOptions::default() };
        let before = Instant::now();
        pod.create(own).await.unwrap();
        pod.client.start_sandbox(&pod.id).await.unwrap();
        runs.push(before.elapsed());
        pods.push(pod);
    }
    let mut containers = Vec::new();
    for (n, pod) in pods.iter().enumerate() {
        let container = pod.sh(&format!("c{n}"), "echo hello; sleep 1000");
        container.write();
        let before = Instant::now();
        pod.client.create(container.task()).await.unwrap();
        pod.client.start(&container.id, "").await.unwrap();
        creates.push(before.elapsed());
        containers.push(container);
    }
    let mut execs = Vec::new();
    for _ in 0..30 {
        let client = &pods[0].client;
        let task = holdfast_shim::client::ExecTask {
            process: crate::node::process(&["/bin/true"]).to_string().into_bytes(),
            ..Default::default()
        };
        let before = Instant::now();
        client.exec("c0", "e", task).await.unwrap();
        client.start("c0", "e").await.unwrap();
        client.wait("c0", "e").await.unwrap();
        client.delete("c0", "e").await.unwrap();
        execs.push(before.elapsed());
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sum = |name| pods.iter().map(|pod| kib(pod.pid, name)).sum::<u64>() / pods.len() as u64;
    println!(
        "PSS {} KiB, private dirty {} KiB, RSS {} KiB",
        sum("Pss:"),
        sum("Private_Dirty:"),
        sum("Rss:")
    );
    println!(
        "p50: shim start {:?}, pod {:?}, container create+start {:?}, exec {:?}",
        median(starts),
        median(runs),
        median(creates),
        median(execs)
    );
    let mut stops = Vec::new();
    for container in &containers {
        let before = Instant::now();
        container.kill(9).await;
        container.wait().await;
        stops.push(before.elapsed());
    }
    let mut deletes = Vec::new();
    for container in &containers {
        let before = Instant::now();
        container.delete().await;
        deletes.push(before.elapsed());
    }
    println!("p50: kill to exit {:?}, delete {:?}", median(stops), median(deletes));

    let noisy = pods[0]
        .sh("noisy", "yes 'a line of some forty characters, as they are' | head -n 2000000")
        .create()
        .await;
    let before = Instant::now();
    pods[0].client.start("noisy", "").await.unwrap();
    assert_eq!(noisy.wait().await.status, 0);
    let took = before.elapsed();
    let size = fs::metadata(&noisy.log).unwrap().len();
    println!("log: {} MB in {took:?}", size / 1_000_000);
    noisy.delete().await;
    println!("after that: PSS {} KiB", kib(pods[0].pid, "Pss:"));
    for round in 0..4 {
        let busy = pods[1]
            .sh(&format!("busy{round}"), "while true; do echo x; sleep 0.01; done")
            .start()
            .await;
        for _ in 0..50 {
            let task = holdfast_shim::client::ExecTask {
                process: crate::node::process(&["/bin/true"]).to_string().into_bytes(),
                ..Default::default()
            };
            pods[1].client.exec(&busy.id, "e", task).await.unwrap();
            pods[1].client.start(&busy.id, "e").await.unwrap();
            pods[1].client.wait(&busy.id, "e").await.unwrap();
            pods[1].client.delete(&busy.id, "e").await.unwrap();
            pods[1].client.stats(&busy.id).await.unwrap();
        }
        busy.kill(9).await;
        busy.wait().await;
        busy.delete().await;
        println!(
            "after {} execs: private dirty {} KiB",
            (round + 1) * 50,
            kib(pods[1].pid, "Private_Dirty:")
        );
    }
    for pod in &pods {
        pod.client.shutdown_sandbox(&pod.id).await.unwrap();
    }
}
