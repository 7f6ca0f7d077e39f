//! The command line of the real program: help, configuration, check, tokens, and how it refuses.

use std::net::TcpListener;
use std::path::Path;

use assert_cmd::Command;

/// The program with nothing of this environment's that could change it.
fn ringmain(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ringmain").expect("built by cargo");
    command.env_clear().args(args).timeout(std::time::Duration::from_secs(30));
    command
}

struct Output {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("the program runs");
    Output {
        code: output.status.code().expect("it exits by itself"),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// Runs and expects success.
fn ok(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
    output.stdout
}

/// Runs and expects a refusal of exactly these two lines.
fn refused(command: &mut Command, error: &str, help: &str) {
    let output = run(command);
    assert_eq!(output.code, 1, "{}{}", output.stdout, output.stderr);
    assert_eq!(output.stderr, format!("error: {error}\nhelp: {help}\n"));
}

fn write(dir: &Path, text: &str) -> String {
    let path = dir.join("ringmain.toml");
    std::fs::write(&path, text).expect("a writable directory");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn every_command_explains_itself() {
    let help = ok(&mut ringmain(&["--help"]));
    assert!(help.contains("Exit codes:"), "{help}");
    for command in ["serve", "check", "genconfig", "token", "version"] {
        assert!(help.contains(&format!("  {command} ")), "{help}");
        let own = ok(&mut ringmain(&[command, "--help"]));
        assert!(own.contains("Usage: ringmain") && own.contains("Example"), "{own}");
    }
    let keys = ok(&mut ringmain(&["serve", "--help"]));
    for flag in
        ["--listen", "--admin", "--shards", "--bus", "--demo", "--config", "--client.ping_interval_ms"]
    {
        assert!(keys.contains(flag), "{flag} in {keys}");
    }
}

#[test]
fn the_version_is_the_packages() {
    assert_eq!(ok(&mut ringmain(&["version"])), format!("ringmain {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn an_unknown_flag_names_the_nearest_and_exits_with_2() {
    let output = run(&mut ringmain(&["serve", "--client.ping_intervall_ms=1"]));
    assert_eq!(output.code, 2);
    assert!(output.stderr.contains("--client.ping_interval_ms"), "{}", output.stderr);
}

#[test]
fn the_generated_file_changes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = write(dir.path(), &ok(&mut ringmain(&["genconfig"])));
    let values = |report: &str| -> Vec<String> {
        let lines = report.lines().take_while(|line| !line.starts_with("# Memory"));
        lines.map(|line| line.split("  # ").next().unwrap_or_default().to_owned()).collect()
    };
    let plain = ok(&mut ringmain(&["check", "--shards=1", "--limits.connections_per_shard=100"]));
    let from_file =
        ok(&mut ringmain(&["check", "--config", &file, "--shards=1", "--limits.connections_per_shard=100"]));
    // Namespaces list what was set, so that they show the file's keys: compare up to there.
    let up_to = |report: &str| -> Vec<String> {
        values(report).into_iter().take_while(|line| !line.starts_with("[namespaces")).collect()
    };
    assert_eq!(up_to(&plain), up_to(&from_file));
}

#[test]
fn check_shows_values_with_their_origin_and_hides_secrets() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = write(dir.path(), "[client]\nchannel_limit = 5\n[token]\nhmac_secret = \"hunter1\"\n");
    let args = ["check", "--config", &file, "--shards", "2", "--limits.connections_per_shard=1000"];
    let report = ok(ringmain(&args).env("RINGMAIN_API_KEY", "hunter2"));
    assert!(!report.contains("hunter"), "{report}");
    for part in [
        &format!("channel_limit = 5  # {file}"),
        "api_key = \"***\"  # RINGMAIN_API_KEY",
        &format!("hmac_secret = \"***\"  # {file}"),
        "shards = 2  # --shards",
        "# Memory at worst, 2 shards",
        "connections (limits.connections_per_shard)",
        "# Kernel and limits",
        "io_uring: a ring opens",
        "ringmain serve would start.",
    ] {
        assert!(report.contains(part), "{part} in\n{report}");
    }
}

#[test]
fn check_asks_the_bus_and_shows_no_secret() {
    let check = |url: &str, expected: &str| {
        let args = ["check", "--shards=1", "--limits.connections_per_shard=100", "--bus", url];
        let report = ok(&mut ringmain(&args));
        assert!(!report.contains("hunter"), "{report}");
        let (_, bus) = report.split_once("# Bus").expect("a section on the bus");
        assert!(bus.contains(expected) && bus.contains("mend: "), "{bus}");
    };
    // Nobody listens on port 1.
    check("redis://:hunter@127.0.0.1:1", "warn    Redis 127.0.0.1:1 cannot be reached");
    check("nats://user:hunter@127.0.0.1:1", "warn    the NATS server 127.0.0.1:1 cannot be used");
    check("kafka://user:hunter@127.0.0.1:1", "warn    Kafka does not answer");
}

#[test]
fn the_file_and_the_demo_may_come_from_variables() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = write(dir.path(), "[client]\nchannel_limit = 5\n");
    let args = ["check", "--shards=1", "--limits.connections_per_shard=100"];
    let check = |demo: &str, expected: bool| {
        let report = ok(ringmain(&args).env("RINGMAIN_CONFIG", &file).env("RINGMAIN_DEMO", demo));
        assert!(report.contains("channel_limit = 5"), "{report}");
        assert_eq!(
            report.contains("allow_anonymous_connect_without_token = true  # --demo"),
            expected,
            "{demo}"
        );
    };
    check("true", true);
    check("1", true);
    check("false", false);
    check("0", false);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let program = env!("CARGO_BIN_EXE_ringmain");
    let mut command = Command::new("sh");
    let output = run(command.arg("-c").arg(format!("{program} genconfig | head -n 1")));
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
}

#[test]
fn check_fails_where_serve_would() {
    let budget = "--server.memory_budget_bytes=67108864";
    let output = run(&mut ringmain(&["check", budget]));
    assert_eq!(output.code, 1);
    assert!(output.stdout.contains("ringmain serve would refuse: the worst case is"), "{}", output.stdout);
    let output = run(&mut ringmain(&["serve", budget, "--listen=127.0.0.1:0", "--admin=127.0.0.1:0"]));
    assert_eq!(output.code, 1);
    assert!(output.stderr.starts_with("error: the worst case is"), "{}", output.stderr);
    assert!(output.stderr.contains("the budget 64.0 MiB (server.memory_budget_bytes)"), "{}", output.stderr);
}

#[test]
fn what_is_wrong_is_one_line_with_its_remedy() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = write(dir.path(), "[client]\nping_intervall_ms = 1\n");
    refused(
        &mut ringmain(&["serve", "--config", &file]),
        &format!("unknown key `client.ping_intervall_ms` ({file})"),
        "did you mean `client.ping_interval_ms`?",
    );
    refused(
        &mut ringmain(&["serve", "--config", "/nowhere/r.toml"]),
        "/nowhere/r.toml: No such file or directory (os error 2)",
        "`ringmain genconfig` prints a file to start from",
    );
    refused(
        ringmain(&["check"]).env("RINGMAIN_APIKEY", "hunter2"),
        "unknown variable RINGMAIN_APIKEY",
        "did you mean RINGMAIN_API_KEY?",
    );
    refused(
        &mut ringmain(&["serve", "--bus", "amqp://:hunter2@localhost"]),
        "bus `amqp://…` is none of redis, rediss, redis+cluster, rediss+cluster, redis+sentinel, rediss+sentinel, nats, \
         tls, kafka, kafkas, memory",
        "`ringmain genconfig` describes every key",
    );
    refused(
        &mut ringmain(&["serve", "--demo", "--admin", "0.0.0.0:8001"]),
        "--demo without a key opens the API to anyone who reaches 0.0.0.0:8001",
        "keep admin.listen on loopback, or set RINGMAIN_API_KEY",
    );
    refused(
        &mut ringmain(&["serve", "--token.rsa_public_key=nonsense"]),
        "token.rsa_public_key: InvalidKeyFormat",
        "tokens are verified with it: give a PEM public key",
    );
}

#[test]
fn a_held_port_is_named_with_its_holder() {
    let held = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = held.local_addr().expect("bound").to_string();
    let pid = std::process::id();
    let name = std::fs::read_to_string("/proc/self/comm").expect("a name").trim().to_owned();
    let error = format!("{address} is already in use by process {pid} ({name})");
    let help = format!("stop it (kill {pid}), or listen elsewhere (--listen, --admin)");
    refused(&mut ringmain(&["serve", "--listen", &address, "--admin=127.0.0.1:0"]), &error, &help);
    refused(&mut ringmain(&["serve", "--admin", &address, "--listen=127.0.0.1:0"]), &error, &help);
}

#[test]
fn tokens_are_minted_with_the_configured_secret_or_a_given_one() {
    let parts = |token: &str| -> Vec<String> { token.trim_end().split('.').map(str::to_owned).collect() };
    let configured = ok(ringmain(&["token", "--user", "alice"]).env("RINGMAIN_TOKEN_HMAC_SECRET", "s"));
    assert_eq!(parts(&configured).len(), 3, "{configured}");
    let exp = "--exp=4102444800";
    let given = |secret: &str| ok(&mut ringmain(&["token", "--user=alice", exp, "--secret", secret]));
    assert_ne!(parts(&given("a"))[2], parts(&given("b"))[2]);
    refused(
        &mut ringmain(&["token", "--user", "alice"]),
        "no HMAC secret to sign with",
        "give --secret, RINGMAIN_TOKEN_HMAC_SECRET or --config; the node needs the same",
    );
}
