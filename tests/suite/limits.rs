//! How often one may call, and guess.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use dermflow_auth::{
    password::Peppers,
    throttle::{Admission, FREE_FAILURES, Guess, LONGEST_DELAY, Outcome, Throttle},
};
use dermflow_schemas::clock;
use dermflow_tests::{
    client::{Answer, Client, sample, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use futures_util::future::try_join_all;
use reqwest::Method;

const LONG: Duration = Duration::from_secs(30);

/// The value of a key of an item of a structured field, such as `r` of `requests`.
fn item(field: &str, name: &str, key: &str) -> Option<u64> {
    let item = field.split(", ").find(|item| item.starts_with(&format!("\"{name}\";")))?;
    item.split(';').find_map(|part| part.strip_prefix(&format!("{key}=")))?.parse().ok()
}

// Every answer to a client says how it stands; the first one beyond the limit is a 429 that
// says when to come back, and then the client is served. Polls and images have rates of their own.
#[tokio::test(flavor = "multi_thread")]
async fn answers_say_how_the_client_stands() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    lab.auth(&["user", "quota", "demo", "--requests", "60", "--images", "4"])?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    let known = async || {
        let answer = lab.client().get(&format!("/fhir/_async/{job}")).await.ok()?;
        (item(answer.header("ratelimit-policy"), "requests", "q")? == 10).then_some(answer)
    };
    let poll = eventually("the replica knows the quota", LONG, known).await?;
    assert_eq!(
        poll.header("ratelimit-policy"),
        "\"requests\";q=10;w=10, \"polls\";q=2000;w=10, \"images\";q=4;w=60;qu=\"images\""
    );
    assert_eq!(item(poll.header("ratelimit"), "images", "r"), Some(3), "{}", poll.header("ratelimit"));
    assert_eq!(item(poll.header("ratelimit"), "requests", "r"), None, "polls do not count as requests");
    let mut before = 10;
    let refused = loop {
        let answer = lab.client().get("/jobs/nonsense").await?;
        let left = item(answer.header("ratelimit"), "requests", "r").context("no RateLimit")?;
        if answer.status == 429 {
            break answer;
        }
        assert_eq!(answer.status, 404);
        assert!(left < before || before == 0, "{left} after {before}");
        before = left;
    };
    assert_eq!((refused.code(), before), ("rate-exceeded", 0));
    let recorded = "SELECT count(*) FROM auth.audit JOIN auth.users ON actor = users.id::text \
                    WHERE username = 'demo' AND action = 'access' AND outcome = 'refused' AND code = 'rate-exceeded'";
    assert_eq!(lab.count(recorded).await?, 1);
    let pause: u64 = refused.header("retry-after").parse()?;
    assert!((1..=20).contains(&pause), "{pause}");
    assert_eq!(lab.client().get(&format!("/fhir/_async/{job}")).await?.status, 202, "polls go on");
    tokio::time::sleep(Duration::from_secs(pause)).await;
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.status, 200);
    lab.auth(&["user", "quota", "demo", "--requests", "6000"])?;
    let known = async || {
        let answer = lab.client().get(&format!("/fhir/_async/{job}")).await.ok()?;
        (item(answer.header("ratelimit-policy"), "requests", "q")? == 1_000).then_some(())
    };
    eventually("the replica knows the new quota", LONG, known).await?;
    // Three images are left, of which none counts for a request that has too many.
    for (status, code) in [(202, ""), (202, ""), (202, ""), (429, "rate-exceeded")] {
        let answer = lab.client().analyze(&sample("ham10000-nv.jpg"), &[("prefer", "respond-async")]).await?;
        assert_eq!(
            (answer.status, if status == 429 { answer.code() } else { "" }),
            (status, code),
            "{}",
            answer.text
        );
    }
    lab.stop().await
}

// Who does not show who it is counts for the network that it comes from, and is told so with every answer: sign-ins,
// public documents, what is refused, what is not there. What is left is nobody's business but that network's.
#[tokio::test(flavor = "multi_thread")]
async fn answers_say_how_a_network_stands() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    lab.start_registration().await?;
    let operator = lab.start_operate("olga").await?;
    let policy = "\"requests\";q=10000;w=10";
    let anonymous = lab.client().clone().with_token("");
    let forged = lab.client().clone().with_token("nonsense");
    let password = lab.password("demo")?;
    let form = async |path: &str| {
        send(anonymous.request(Method::POST, path).form(&[("grant_type", "client_credentials")])).await
    };
    let answers = [
        (401, anonymous.get("/jobs").await?),
        (401, forged.get("/jobs").await?),
        (401, forged.at(&lab.operate_url()?).get("/dead").await?),
        (404, anonymous.get("/nothing").await?),
        (405, send(anonymous.request(Method::PUT, "/jobs")).await?),
        (200, anonymous.get("/.well-known/jwks.json").await?),
        (200, anonymous.try_login("demo", &password).await?),
        (401, anonymous.try_login("demo", "wrong").await?),
        (401, form("/oauth/token").await?),
        (422, form("/login").await?),
    ];
    for (n, (status, answer)) in answers.iter().enumerate() {
        assert_eq!((answer.status, answer.header("ratelimit-policy")), (*status, policy), "answer {n}");
        let left = item(answer.header("ratelimit"), "requests", "r").context("no RateLimit")?;
        assert!(left < 10_000, "answer {n}: {left}");
    }
    // Staff's addresses have a rate, too.
    let staff = lab.staff("root")?;
    let first = staff.get("/accounts").await?;
    assert_eq!((first.status, first.header("ratelimit-policy")), (401, "\"requests\";q=1000;w=10"));
    ensure!(item(first.header("ratelimit"), "requests", "r").is_some());
    let refused = async || {
        let answers = try_join_all((0..50).map(|_| staff.get("/accounts"))).await.ok()?;
        answers.into_iter().find(|answer| answer.status == 429)
    };
    let refused = eventually("staff is asked to wait", LONG, refused).await?;
    assert_eq!(
        (refused.code(), item(refused.header("ratelimit"), "requests", "r")),
        ("rate-exceeded", Some(0))
    );
    // The operators' process and ingress count together.
    let (calls, ingress) = (200, operator.clone().at(&lab.url(0)));
    for answer in try_join_all((0..calls).map(|_| ingress.get("/jobs"))).await? {
        assert_eq!(answer.status, 403);
    }
    let heard = async || {
        let answer = operator.get("/dead").await.ok()?;
        // Its own calls are fewer by far.
        (item(answer.header("ratelimit"), "requests", "r")? <= 10_000 - calls).then_some(())
    };
    eventually("the operators' process has heard of them", Duration::from_secs(2), heard).await?;
    lab.stop().await
}

// A flood of which nobody knows who sends it is refused, and who is known is served though it comes from the same
// network.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_nobodys_requests_keeps_no_client_out() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let anonymous = lab.client().clone().with_token("");
    let password = lab.password("demo")?;
    let form = [("username", "demo"), ("password", &password), ("scope", "offline_access")];
    let login = send(anonymous.request(Method::POST, "/login").form(&form)).await?;
    let refresh_token = login.body["refresh_token"].as_str().context("no refresh token")?;
    // With a header that proves nothing, as clients have it who send it with every request.
    let refresh = async || {
        let form = [("grant_type", "refresh_token"), ("refresh_token", refresh_token)];
        send(lab.client().request(Method::POST, "/oauth/token").form(&form)).await
    };
    let begun = tokio::time::Instant::now();
    let (mut served, mut refused) = (0, None);
    while refused.is_none() && begun.elapsed() < LONG {
        let answers = try_join_all((0..64).map(|_| anonymous.get("/.well-known/jwks.json"))).await?;
        served += answers.iter().filter(|answer| answer.status == 200).count();
        refused = answers.into_iter().find(|answer| answer.status == 429);
    }
    println!("{served} served in {:?}", begun.elapsed());
    let refused = refused.context("nothing was refused")?;
    assert_eq!(refused.code(), "rate-exceeded");
    assert_eq!(item(refused.header("ratelimit"), "requests", "r"), Some(0));
    let pause: u64 = refused.header("retry-after").parse()?;
    ensure!((1..=11).contains(&pause), "{pause}");
    // The sign-ins were of the same network.
    assert!(served >= 9_990, "{served}");
    assert_eq!(anonymous.try_login("demo", &password).await?.status, 429);
    assert_eq!(lab.client().clone().with_token("nonsense").get("/jobs").await?.status, 429);
    assert_eq!(refresh().await?.status, 429);
    assert_eq!(lab.client().get("/jobs").await?.status, 200);
    lab.stop().await
}

// Two replicas grant the limit together, not each.
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_holds_over_two_replicas_within_a_tenth() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    lab.auth(&["user", "quota", "demo", "--requests", "1800"])?;
    let replicas = [lab.client().clone(), lab.client().clone().at(&lab.url(1))];
    for replica in &replicas {
        let known = async || {
            let answer = replica.get("/jobs/nonsense").await.ok()?;
            (item(answer.header("ratelimit-policy"), "requests", "q")? == 300).then_some(())
        };
        eventually("both know the quota", LONG, known).await?;
    }
    // The looks have used a part of it, of which both have heard when they say the same.
    let agreed = async || {
        let look = async |n: usize| {
            let answer = replicas[n].get("/jobs/nonsense").await.ok()?;
            item(answer.header("ratelimit"), "requests", "r")
        };
        let (here, there) = (look(0).await?, look(1).await?);
        (here.abs_diff(there) <= 2).then_some(there as f64)
    };
    let left = eventually("both know what is left", LONG, agreed).await?;
    let call = |n: usize| replicas[n % 2].get("/jobs/nonsense");
    let begun = tokio::time::Instant::now();
    let mut granted = 0;
    while begun.elapsed() < Duration::from_secs(6) {
        let answers: Vec<Answer> = try_join_all((0..16).map(call)).await?;
        granted += answers.iter().filter(|answer| answer.status == 404).count() as u32;
    }
    println!("{granted} of {left} granted");
    assert!((0.9 * left..=1.1 * left).contains(&f64::from(granted)), "{granted} of {left}");
    lab.stop().await
}

fn address(n: usize) -> IpAddr {
    Ipv4Addr::new(203, 0, 113, n as u8).into()
}

fn granted(admission: Admission) -> Option<Guess> {
    match admission {
        Admission::Granted(guess) => Some(guess),
        Admission::Delayed(_) => None,
    }
}

// NIST SP 800-63B-4 §3.2.2 and ASVS 6.1.1: fifty sources in turn, through two replicas, for two hours of a clock that
// is handed in. The owner signs in all the while, and the tables forget.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_a_hundred_guesses_an_hour_and_the_owner_is_let_in() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let pools = [lab.pool("dermflow_ingress")?, lab.pool("dermflow_ingress")?];
    let throttle = Throttle::new(&Peppers::default());
    let (start, home) = (clock::now(), address(200));
    let minutes = |n: i64| start + Duration::from_mins(1) * n as u32;
    for name in ["demo", "nobody"] {
        let first =
            granted(throttle.admit(&pools[0], name, home, start).await?).context("the first login")?;
        throttle.settle(&pools[0], first, Outcome::Right, start).await?;
        let mut guesses = Vec::new();
        for minute in 0..120 {
            let now = minutes(minute);
            for n in 0..50 {
                let pool = &pools[n % 2];
                if let Some(guess) = granted(throttle.admit(pool, name, address(n), now).await?) {
                    throttle.settle(pool, guess, Outcome::Wrong, now).await?;
                    guesses.push(minute);
                }
            }
            let owner = granted(throttle.admit(&pools[1], name, home, now).await?);
            let owner = owner.with_context(|| format!("the owner is shut out in minute {minute}"))?;
            throttle.settle(&pools[1], owner, Outcome::Right, now).await?;
        }
        let most =
            (0..120).map(|from| guesses.iter().filter(|at| (from..from + 60).contains(*at)).count()).max();
        println!("{name}: {} guesses in two hours, {most:?} in the worst one", guesses.len());
        assert!((90..=100).contains(&most.unwrap_or(0)), "{most:?}");
        // The owner from elsewhere waits like a stranger, and is told so.
        let elsewhere = throttle.admit(&pools[0], name, address(201), minutes(119)).await?;
        assert!(matches!(elsewhere, Admission::Delayed(wait) if wait > Duration::ZERO));
    }
    let rows = lab.count("SELECT count(*) FROM auth.login_guesses").await?;
    assert!((50..=200).contains(&rows), "{rows}");
    // Two days later others sign in, and what is left of it all goes.
    for n in 0..60 {
        let now = minutes(3 * 1_440 + n);
        let guess = granted(throttle.admit(&pools[0], &format!("user-{n}"), address(250), now).await?)
            .context("guess")?;
        throttle.settle(&pools[0], guess, Outcome::Right, now).await?;
    }
    let old = "SELECT count(*) FROM auth.login_guesses WHERE expires_at < now() + interval '2 days'";
    assert_eq!(lab.count(old).await?, 0);
    lab.stop().await
}

// Callers take their turn at an account in another order than that of their clocks: who signs in rightly is not in the
// way of one that read its clock a moment earlier, and known or not makes no difference.
#[tokio::test(flavor = "multi_thread")]
async fn right_passwords_at_once_are_in_nobodys_way() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let pool = lab.pool("dermflow_ingress")?;
    let throttle = Throttle::new(&Peppers::default());
    let (late, home) = (clock::now(), address(200));
    let early = late - Duration::from_millis(300);
    for round in 0..3 {
        let first = granted(throttle.admit(&pool, "demo", home, late).await?).context("the late one")?;
        let second = granted(throttle.admit(&pool, "demo", home, early).await?)
            .with_context(|| format!("beside it, round {round}"))?;
        throttle.settle(&pool, first, Outcome::Right, late).await?;
        let third = granted(throttle.admit(&pool, "demo", home, early).await?)
            .with_context(|| format!("after it, round {round}"))?;
        throttle.settle(&pool, second, Outcome::Right, early).await?;
        throttle.settle(&pool, third, Outcome::Right, early).await?;
    }
    lab.stop().await
}

// Wrong passwords at one source: five, then a pause that doubles. A source that tries many names runs out, too; what
// was not checked does not count, and guesses at the same time do not slip through.
#[tokio::test(flavor = "multi_thread")]
async fn delays_double_and_a_sprayer_runs_out() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (pool, throttle) = (lab.pool("dermflow_ingress")?, Throttle::new(&Peppers::default()));
    let (mut now, mut pauses) = (clock::now(), Vec::new());
    for _ in 0..20 {
        match throttle.admit(&pool, "demo", address(1), now).await? {
            Admission::Granted(guess) => throttle.settle(&pool, guess, Outcome::Wrong, now).await?,
            Admission::Delayed(wait) => {
                pauses.push(wait.as_secs_f64().round() as u64);
                now += wait;
            }
        }
    }
    assert_eq!(pauses[..8], [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!(pauses.len() as i32 + FREE_FAILURES + pauses.len() as i32, 21, "{pauses:?}");
    for _ in 0..6 {
        now += LONGEST_DELAY;
        let guess = granted(throttle.admit(&pool, "demo", address(1), now).await?)
            .context("the longest delay is over")?;
        throttle.settle(&pool, guess, Outcome::Wrong, now).await?;
    }
    let network: IpAddr = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, 0, 1).into();
    let neighbour: IpAddr = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 9, 9, 9, 9).into();
    let spray = (0..300).map(|n| {
        let (pool, throttle) = (pool.clone(), throttle.clone());
        async move {
            let from = if n % 2 == 0 { network } else { neighbour };
            Ok::<_, anyhow::Error>(granted(throttle.admit(&pool, &format!("user-{n}"), from, now).await?))
        }
    });
    let admitted: Vec<Guess> = try_join_all(spray).await?.into_iter().flatten().collect();
    println!("{} of 300 names", admitted.len());
    // Those that were the very first at the same time.
    assert!((100..=104).contains(&admitted.len()), "{}", admitted.len());
    for guess in admitted {
        throttle.settle(&pool, guess, Outcome::Void, now).await?;
    }
    assert!(granted(throttle.admit(&pool, "user-0", network, now).await?).is_some(), "nothing was checked");
    let at_once = (0..200).map(|n| throttle.admit(&pool, "victim", address(n), now));
    let admitted = try_join_all(at_once).await?.into_iter().filter_map(granted).count();
    assert_eq!(admitted, 50);
    lab.stop().await
}

// The same over HTTPS: fifty addresses, two replicas, a known name and an unknown one, which look the same. The owner
// signs in from where it did before, and its token never notices.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_sources_do_not_lock_the_owner_out() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let mut throttled = Vec::new();
    for name in ["demo", "nobody"] {
        let mut checked = 0;
        for n in 0..50_usize {
            let source = Ipv4Addr::new(127, 0, 1, 1 + n as u8).into();
            let stranger = Client::from_source(&lab.ca(), &lab.url(n % 2), source)?;
            for _ in 0..3 {
                let answer = stranger.try_login(name, "not the password").await?;
                match answer.status {
                    401 => checked += 1,
                    503 => {}
                    _ => throttled.push(answer),
                }
            }
        }
        println!("{name}: {checked} of 150 guesses were checked");
        assert!((30..=60).contains(&checked), "{checked}");
    }
    for answer in &throttled {
        assert_eq!((answer.status, answer.code()), (429, "login-throttled"));
        assert!(answer.header("retry-after").parse::<u64>()? >= 1);
    }
    let mut bodies: Vec<String> = throttled.iter().map(|answer| answer.body["title"].to_string()).collect();
    bodies.dedup();
    assert_eq!(bodies.len(), 1);
    let owner = lab.client().clone().login("demo", &lab.password("demo")?).await?;
    assert_eq!(owner.get("/jobs").await?.status, 200);
    assert_eq!(lab.client().clone().at(&lab.url(1)).get("/jobs").await?.status, 200, "the older token");
    lab.stop().await
}

// A hash without the pepper, and one with weak parameters, is replaced at the next login; no row says a password.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_hash_is_replaced_at_the_next_login() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let hash = async || -> Result<String> {
        Ok(lab.sql("SELECT password_hash FROM auth.users WHERE username = 'demo'").await?[0].get(0))
    };
    let first = hash().await?;
    assert!(first.starts_with("$argon2id$v=19$m=19456,t=2,p=1,keyid="), "{first}");
    let plain = dermflow_auth::password::hash(&lab.password("demo")?.into(), &Peppers::default())?;
    lab.sql(&format!("UPDATE auth.users SET password_hash = '{plain}' WHERE username = 'demo'")).await?;
    let anonymous = lab.client().clone();
    assert_eq!(anonymous.try_login("demo", "wrong").await?.status, 401);
    assert_eq!(hash().await?, plain);
    assert_eq!(anonymous.try_login("demo", &lab.password("demo")?).await?.status, 200);
    let second = hash().await?;
    assert!(second.starts_with("$argon2id$v=19$m=19456,t=2,p=1,keyid=") && second != first, "{second}");
    assert_eq!(anonymous.try_login("demo", &lab.password("demo")?).await?.status, 200);
    assert_eq!(hash().await?, second);
    lab.sql("SET ROLE dermflow_ingress").await?;
    for forbidden in [
        "SELECT * FROM auth.login_guesses",
        "SELECT * FROM auth.login_sources",
        "SELECT auth.login_count('', 1, now())",
    ] {
        assert!(lab.sql(forbidden).await.is_err(), "{forbidden}");
    }
    lab.stop().await
}
