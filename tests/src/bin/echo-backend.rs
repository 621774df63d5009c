//! A backend that is up in a millisecond, with the habits that a test asks for.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use drowse_tests::deadline::pause;
use drowse_tests::whoami;

/// What is done with a connection.
#[derive(Clone, Copy, ValueEnum)]
enum Behaviour {
    /// Send back what comes, until its end.
    Echo,
    /// Say "welcome" first, then echo.
    Banner,
    /// Read until the client's FIN, then send everything back and close.
    ReplyAfterFin,
    /// Never read.
    Ignore,
    /// Say both addresses of the connection first, as they are seen here, then echo.
    Whoami,
}

/// A backend for tests.
#[derive(Parser)]
struct Arguments {
    /// HOST:PORT to listen on.
    #[arg(required_unless_present = "inherit")]
    addresses: Vec<String>,
    /// Standard input is a listener, too.
    #[arg(long)]
    inherit: bool,
    #[arg(long, value_enum, default_value = "echo")]
    behaviour: Behaviour,
    /// Milliseconds before listening, or before the exit.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Say READY=1 to systemd as soon as it listens.
    #[arg(long)]
    notify: bool,
    /// Exit with this status in place of listening.
    #[arg(long)]
    exit: Option<u8>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    pause(Duration::from_millis(arguments.delay_ms));
    if let Some(status) = arguments.exit {
        return Ok(ExitCode::from(status));
    }
    let bind = |address| TcpListener::bind(address).with_context(|| format!("listen on {address}"));
    let mut listeners: Vec<TcpListener> = arguments.addresses.iter().map(bind).collect::<Result<_>>()?;
    if arguments.inherit {
        listeners.push(io::stdin().as_fd().try_clone_to_owned().context("take standard input")?.into());
    }
    if arguments.notify {
        notify_ready().context("notify systemd")?;
    }
    let behaviour = arguments.behaviour;
    std::thread::scope(|scope| {
        let accepting: Vec<_> =
            listeners.iter().map(|listener| scope.spawn(move || accept(listener, behaviour))).collect();
        accepting.into_iter().try_for_each(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn accept(listener: &TcpListener, behaviour: Behaviour) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context("accept")?;
        // A client that breaks its connection off is its own affair.
        std::thread::spawn(move || serve(stream, behaviour));
    }
}

fn notify_ready() -> io::Result<()> {
    let path = std::env::var("NOTIFY_SOCKET").map_err(io::Error::other)?;
    UnixDatagram::unbound()?.send_to(b"READY=1", path).map(drop)
}

fn serve(mut stream: TcpStream, behaviour: Behaviour) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match behaviour {
        Behaviour::Echo => {}
        Behaviour::Banner => stream.write_all(b"welcome\n")?,
        Behaviour::ReplyAfterFin => {
            let mut request = Vec::new();
            stream.read_to_end(&mut request)?;
            return stream.write_all(&request);
        }
        Behaviour::Whoami => return whoami::serve(stream),
        Behaviour::Ignore => loop {
            std::thread::park();
        },
    }
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}
