//! The alerts and the dashboard that the packages bring, in Debian's Prometheus.

use std::{
    fs,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::Daemon;

const ALERTS: &str = include_str!("../../../packaging/monitoring/alerts.yml");
const DASHBOARD: &str = include_str!("../../../packaging/monitoring/dashboard.json");
const PATIENCE: Duration = Duration::from_secs(60);
/// What there is nothing of on a node where all is well, and no VM is real.
const MAY_BE_EMPTY: [&str; 4] = [
    "code!=\"Ok\"",
    "hull_vm_cold_starts_total",
    "hull_vm_exits",
    "hull_image_pull_seconds_count",
];
/// A daemon that does not answer for two minutes.
const DOWN: &str = r#"
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series: [{series: 'up{job="hull", instance="node"}', values: "1 0 0 0 1"}]
    alert_rule_test:
      - {eval_time: 2m, alertname: HullDown, exp_alerts: []}
      - eval_time: 3m
        alertname: HullDown
        exp_alerts:
          - exp_labels: {job: hull, instance: node, severity: critical}
            exp_annotations: {summary: "node: no answer from hull; its pods go on, and nothing new starts"}
      - {eval_time: 4m, alertname: HullDown, exp_alerts: []}
"#;

/// A Prometheus in the daemon's network, which looks at it each second.
struct Prometheus<'a> {
    daemon: &'a Daemon,
    child: Child,
}

impl<'a> Prometheus<'a> {
    fn start(daemon: &'a Daemon) -> Self {
        let dir = daemon.dir.path().join("prometheus");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("alerts.yml"), ALERTS).unwrap();
        let config = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n\
                      rule_files: [alerts.yml]\n\
                      scrape_configs: [{job_name: hull, static_configs: [{targets: ['127.0.0.1:9464']}]}]\n";
        fs::write(dir.join("prometheus.yml"), config).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let pid = daemon.child.id().to_string();
        let child = Command::new("nsenter")
            .args(["-n", "-t", &pid, "prometheus", "--config.file"])
            .arg(dir.join("prometheus.yml"))
            .arg("--storage.tsdb.path")
            .arg(dir.join("data"))
            .arg("--web.listen-address=127.0.0.1:9090")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { daemon, child }
    }

    fn get(&self, path: &str, query: &str) -> Result<Value, String> {
        let query = format!("query={query}");
        let url = format!("http://127.0.0.1:9090/api/v1/{path}");
        let arguments = ["-G", "--data-urlencode", &query, &url];
        let done = self.daemon.curl(&arguments);
        let answer: Value =
            serde_json::from_slice(&done.stdout).map_err(|_| format!("{done:?}"))?;
        match answer["status"].as_str() {
            Some("success") => Ok(answer["data"].clone()),
            _ => Err(answer.to_string()),
        }
    }

    /// The series of a query that is answered, once there is one.
    async fn eventually(&self, query: &str) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.get("query", query);
            if let Ok(data) = &answer
                && let Some(series) = data["result"].as_array()
                && !series.is_empty()
            {
                return series.clone();
            }
            assert!(Instant::now() < deadline, "{query}: {answer:?}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn promtool(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new("promtool");
    command.args(arguments);
    command.current_dir(daemon.dir.path().join("prometheus"));
    command.output().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alerts_and_dashboard_work_in_prometheus() {
    if Command::new("prometheus")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("SKIPPED: run Prometheus: tests/host/install.sh prometheus");
        return;
    }
    let Some(daemon) = Daemon::start_with("metrics.address = '127.0.0.1:9464'\n").await else {
        return;
    };
    let prometheus = Prometheus::start(&daemon);
    prometheus.eventually("up{job=\"hull\"} == 1").await;
    // What begins with the first one has grown with the second.
    let first = daemon.run("one", None).await;
    let started = "hull_sandbox_start_seconds_count{stage=\"total\"}";
    prometheus.eventually(started).await;
    let second = daemon.run("two", None).await;
    prometheus
        .eventually(&format!("rate({started}[1m]) > 0"))
        .await;

    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            let query = expression
                .replace("$instance", ".*")
                .replace("$__rate_interval", "1m");
            let data = prometheus.get("query", &query).unwrap();
            let is_empty = data["result"].as_array().unwrap().is_empty();
            let may_be = MAY_BE_EMPTY.iter().any(|part| query.contains(part));
            assert!(
                !is_empty || may_be,
                "{}: nothing of {query}",
                panel["title"]
            );
            asked += 1;
        }
    }
    assert!(asked > 10, "{asked} queries");

    let rules = prometheus.get("rules", "").unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap();
    assert_eq!(rules.len(), ALERTS.matches("- alert:").count());
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert_eq!(rule["state"], "inactive", "{rule}");
    }

    let path = daemon.dir.path().join("prometheus/down.yml");
    fs::write(&path, DOWN).unwrap();
    for arguments in [
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "down.yml"],
    ] {
        let done = promtool(&daemon, &arguments);
        assert!(done.status.success(), "{arguments:?}: {done:?}");
    }
    drop(prometheus);
    daemon.end(&first).await;
    daemon.end(&second).await;
    daemon.assert_nothing_left();
}
