//! The command `auth`: how it takes a password, how it asks before it destroys, and what scripts get of it.

use std::{
    fs,
    io::Write,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::repo;
use dermflow_tests::lab::{Lab, Setup};
use serde_json::{Value, json};

/// Runs `auth` with this on standard input, which is no terminal.
fn run(lab: &Lab, args: &[&str], input: &str) -> Result<Output> {
    let mut command = lab.auth_command()?;
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // Who does not read it may be gone before it is written.
    let _ = child.stdin.take().context("no standard input")?.write_all(input.as_bytes());
    Ok(child.wait_with_output()?)
}

/// Runs `auth` on a terminal and types this when it asks; its exit code, and what the terminal has shown.
fn answer(lab: &Lab, args: &[&str], answer: &str) -> Result<(Option<i32>, String)> {
    let auth = lab.auth_command()?;
    let script = repo().join("tests/terminal/answer.py");
    let mut python = Command::new("python3");
    python.arg(script).args(["Type yes: ", answer]).arg(auth.get_program()).args(auth.get_args());
    let output = python.args(args).stdin(Stdio::null()).output()?;
    ensure!(output.stderr.is_empty(), "{}", text(&output.stderr));
    Ok((output.status.code(), text(&output.stdout)))
}

/// Runs `auth --json`; what it prints is one document.
fn document(lab: &Lab, args: &[&str]) -> Result<Value> {
    let printed = lab.auth(&[&["--json"], args].concat())?;
    serde_json::from_str(&printed).with_context(|| format!("{args:?}: {printed}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

// One line, as it is but for its end. What is refused is not repeated, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_taken_from_standard_input_as_it_is() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let sign_in = async |password: &str| anyhow::Ok(lab.client().try_login("demo", password).await?.status);
    let set = ["user", "password", "demo", "--stdin"];
    let mut old = lab.password("demo")?;
    for (password, end) in [
        ("Zwölf grüne Kacheln am Ofen", "\n"),
        ("Elf graue Katzen im Keller", "\r\n"),
        ("Zehn rote Äpfel unterm Dach", ""),
        ("  Neun blaue Segel vor Anker ", "\n"),
        ("Acht gelbe Drachen im Herbst", "\nand another line\n"),
    ] {
        let output = run(&lab, &set, &format!("{password}{end}"))?;
        assert!(output.status.success(), "{password:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{password:?}");
        assert!(!text(&output.stderr).contains(password.trim()), "{password:?}");
        assert_eq!(sign_in(&old).await?, 401, "the one before {password:?}");
        if password.trim() != password {
            assert_eq!(sign_in(password.trim()).await?, 401, "the spaces belong to {password:?}");
        }
        assert_eq!(sign_in(password).await?, 200, "{password:?}");
        password.clone_into(&mut old);
    }
    for (password, why) in [
        ("Kachelofen 12", "at least 15 characters"),
        ("", "at least 15 characters"),
        ("passwordpassword", "among the first that an attacker would try"),
    ] {
        let output = run(&lab, &set, &format!("{password}\n"))?;
        let told = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{password:?}");
        assert!(told.contains(why), "{password:?}: {told}");
        assert!(password.is_empty() || !told.contains(password), "{told}");
        assert_eq!(sign_in(&old).await?, 200, "the old one after {password:?}");
    }
    let refused =
        "SELECT count(*) FROM auth.audit WHERE action = 'password-set' AND code = 'password-refused'";
    assert_eq!(lab.count(refused).await?, 3);
    lab.stop().await
}

/// All accounts and credentials, and how much the command has done to them.
async fn state(lab: &Lab) -> Result<String> {
    let all = "SELECT concat_ws('|', (SELECT string_agg(u::text, '|' ORDER BY id) FROM auth.users u), \
               (SELECT string_agg(c::text, '|' ORDER BY id) FROM auth.credentials c), \
               (SELECT count(*) FROM auth.audit WHERE actor = 'auth'))";
    Ok(lab.sql(all).await?[0].get(0))
}

// A person is asked, and only a plain yes counts; where nobody can be asked, --yes is needed.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_destroyed_without_consent() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    for name in ["moved", "gone"] {
        lab.register(name).await?;
        lab.auth(&["credential", "add", name, "--label", "theirs"])?;
    }
    let removed = document(&lab, &["credential", "add", "demo", "--label", "removed"])?;
    lab.auth(&["credential", "add", "demo", "--label", "replaced"])?;
    let removed = removed["credential"].as_str().context("no credential")?;
    let destroying = [
        &["user", "change", "moved", "--role", "auditor"][..],
        &["credential", "remove", "demo", removed],
        &["credential", "rotate", "demo", "--overlap-days", "0"],
        &["user", "delete", "gone"],
        &["audit", "prune"],
    ];
    let before = state(&lab).await?;
    for args in destroying {
        for input in ["", "yes\n"] {
            let output = run(&lab, args, input)?;
            assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()), "{args:?}");
            assert!(text(&output.stderr).contains("say --yes"), "{args:?}: {}", text(&output.stderr));
        }
        // The last one is the end of input.
        for typed in ["no\n", "y\n", "\n", "\u{4}"] {
            let (code, shown) = answer(&lab, args, typed)?;
            assert_eq!(code, Some(1), "{args:?} {typed:?}: {shown}");
            assert!(shown.contains("cannot be undone") && shown.contains("not done"), "{args:?}: {shown}");
        }
    }
    assert_eq!(state(&lab).await?, before);
    for args in destroying {
        let (code, shown) = answer(&lab, args, "yes\n")?;
        assert_eq!(code, Some(0), "{args:?}: {shown}");
    }
    let done = "SELECT concat_ws(' ', (SELECT role FROM auth.users WHERE username = 'moved'), \
                (SELECT string_agg(username || ':' || label, ' ') FROM auth.credentials c \
                JOIN auth.users ON users.id = account), \
                (SELECT count(*) FROM auth.users WHERE username = 'gone'))";
    assert_eq!(lab.sql(done).await?[0].get::<_, String>(0), "auditor demo:rotated 0");
    lab.stop().await
}

// With --json a script reads every command: what it shows is JSON, and otherwise there is nothing to read.
#[tokio::test(flavor = "multi_thread")]
async fn scripts_read_every_command() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let folder = std::env::temp_dir().join(format!("dermflow-keys-{}", uuid::Uuid::new_v4().simple()));
    let keys = folder.to_string_lossy();
    for (args, members) in [
        (&["bootstrap", "root"][..], &["id", "name", "password"][..]),
        (&["user", "create", "clinic"], &["id", "name", "password"]),
        (&["user", "password", "clinic"], &["name", "password"]),
        (&["credential", "add", "clinic", "--label", "a"], &["client_id", "client_secret", "credential"]),
        (&["credential", "rotate", "clinic"], &["client_id", "client_secret", "credential"]),
        (&["signing-key", "add", &keys], &["begins", "file", "kid"]),
        (&["audit", "verify"], &["head", "intact", "links"]),
        (&["audit", "prune", "--yes"], &["removed"]),
    ] {
        let shown = document(&lab, args)?;
        let names: Vec<_> = shown.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, members, "{args:?}");
        assert!(shown.as_object().into_iter().flatten().all(|(_, value)| !value.is_null()), "{shown}");
    }
    let shown = document(&lab, &["user", "show", "clinic"])?;
    assert_eq!((&shown["name"], shown["credentials"].as_array().map(Vec::len)), (&json!("clinic"), Some(2)));
    let one = shown["credentials"][0]["id"].as_str().context("no credential")?;
    let identity = ["--issuer", "https://login.clinic.example", "--subject", "device 7"];
    for args in [
        &["migrate"][..],
        &["user", "change", "clinic", "--contact", "it@clinic.example"],
        &["user", "quota", "clinic", "--jobs", "7"],
        &["user", "disable", "clinic"],
        &["user", "enable", "clinic"],
        &["user", "revoke", "clinic"],
        &[&["user", "link", "clinic"], &identity[..]].concat(),
        &[&["user", "unlink", "clinic"], &identity[..]].concat(),
        &["credential", "remove", "clinic", one, "--yes"],
        &["user", "delete", "clinic", "--yes"],
        &["user", "list", "--state", "disabled"],
        &["audit", "export", "--until", "2020-01-01"],
        &["signing-key", "prune", &keys],
    ] {
        assert_eq!(lab.auth(&[&["--json"], args].concat())?, "", "{args:?}");
    }
    let listed = lab.auth(&["user", "list", "--json"])?;
    let listed = listed.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let names: Vec<_> = listed.iter().map(|account| &account["name"]).collect();
    assert_eq!(names, ["demo", "root"]);
    let verified = document(&lab, &["audit", "verify"])?;
    let head = verified["head"].as_str().context("no head")?;
    let told = format!("intact, links {}, head {head}", verified["links"]);
    assert_eq!((&verified["intact"], lab.auth(&["audit", "verify"])?), (&json!(true), told));
    let failed = run(&lab, &["--json", "user", "show", "nobody"], "")?;
    assert_eq!((failed.status.code(), text(&failed.stdout)), (Some(1), String::new()));
    signing_keys(&lab, &keys)?;
    fs::remove_dir_all(folder)?;
    lab.stop().await
}

/// A folder with one key gets a second one, and loses the first.
fn signing_keys(lab: &Lab, folder: &str) -> Result<()> {
    let list = || {
        let listed = lab.auth(&["--json", "signing-key", "list", folder])?;
        anyhow::Ok(listed.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?)
    };
    let moved = |key: &Value, stem: &str| {
        let to = format!("{folder}/{stem}.pem");
        fs::rename(key["file"].as_str().unwrap_or_default(), &to).map(|()| to)
    };
    let first = list()?;
    ensure!(first.len() == 1, "{first:?}");
    let old = moved(&first[0], "20200101T000000Z")?;
    let second = document(lab, &["signing-key", "add", folder])?;
    let both = list()?;
    assert_eq!(both[0], json!({"file": old, "kid": first[0]["kid"], "begins": "2020-01-01T00:00:00Z"}));
    assert_eq!((both.len(), &both[1]), (2, &second));
    let files = format!("{old}\n{}", second["file"].as_str().context("no file")?);
    assert_eq!(lab.auth(&["signing-key", "list", folder])?, files, "as text");
    moved(&second, "20200102T000000Z")?;
    let pruned = document(lab, &["signing-key", "prune", folder])?;
    assert_eq!((pruned, fs::exists(&old)?), (both[0].clone(), false));
    Ok(())
}

// A number goes back to what every account has, one alone or all of them; the trail says which.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_goes_back_to_the_default() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let quota = || anyhow::Ok(document(&lab, &["user", "show", "demo"])?["quota"].take());
    let usual = quota()?;
    let own = ["--jobs", "7", "--bytes", "9000000", "--running", "2", "--weight", "3", "--requests", "600"];
    lab.auth(&[&["user", "quota", "demo", "--images", "60"], &own[..]].concat())?;
    let changed = quota()?;
    assert_eq!(
        changed,
        json!({"jobs": 7, "bytes": 9_000_000, "running": 2, "weight": 3, "requests": 600, "images": 60,
               "retention_days": 7})
    );
    lab.auth(&["user", "quota", "demo", "--jobs", "default", "--weight", "5"])?;
    let mut expected = changed;
    expected["jobs"] = usual["jobs"].clone();
    expected["weight"] = json!(5);
    assert_eq!(quota()?, expected, "what was not named stays");
    lab.auth(&["user", "change", "demo", "--contact", "it@example.org"])?;
    assert_eq!(quota()?, expected);
    assert!(lab.auth(&["user", "quota", "demo", "--requests", "5"]).is_err(), "too few");
    assert_eq!(quota()?, expected);
    lab.auth(&["user", "quota", "demo", "--default"])?;
    assert_eq!(quota()?, usual);
    let own = "SELECT count(*) FROM auth.users WHERE \
               num_nonnulls(quota_jobs, quota_bytes, quota_running, weight, quota_requests, quota_images, \
               retention_days) > 0";
    assert_eq!(lab.count(own).await?, 0, "whatever a later build gives");
    let recorded = "SELECT count(*) FROM auth.audit WHERE action = 'user-changed' \
                    AND detail->'quota' = '{\"jobs\": null, \"weight\": 5}'";
    assert_eq!(lab.count(recorded).await?, 1);
    lab.stop().await
}
