/**
 * Machines that lie before there is an output: in SSH, of themselves, on the
 * way to their daemon, or as one.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { encode } from "../../mod.ts";
import { STDERR } from "./liar.ts";
import {
  daemonSays,
  endless,
  flood,
  LOG,
  MEBIBYTE,
  mebibytes,
  noise,
  send,
} from "./lies.ts";
import type { Row } from "./lies.ts";

/** A machine of each kind. */
export const SESSION_ROWS: readonly Row[] = [
  // No SSH, or not much of it.
  {
    machine: "sends a banner of megabytes",
    lies: () => ({ connection: send(() => mebibytes(64)) }),
    answer: "postpone",
    says: /failed to connect to .*[Hh]eader/,
    quick: true,
  },
  {
    machine: "sends banners line by line without end",
    lies: () => ({
      connection: send(() => endless(Buffer.from("welcome\r\n"))),
    }),
    answer: "postpone",
    says: /failed to connect to .*greeting lines/,
  },
  {
    machine: "talks HTTP and waits",
    lies: () => ({
      connection: send(() => [Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")]),
    }),
    answer: "postpone",
    says: /failed to connect to |has not answered/,
  },
  {
    machine: "says nothing",
    lies: () => ({ connection: () => {} }),
    answer: "postpone",
    says: /failed to connect to .*[Tt]imed out|has not answered/,
    quick: true,
  },
  {
    machine: "sends random bytes",
    lies: () => ({
      connection: send(() => [Buffer.from(noise(2 ** 20))]),
    }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "closes at once",
    lies: () => ({ connection: (socket) => socket.destroy() }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "stalls after its identification",
    lies: () => ({
      connection: send(() => [Buffer.from("SSH-2.0-liar\r\n")]),
    }),
    answer: "postpone",
    says: /failed to connect to .*[Tt]imed out|has not answered/,
  },
  {
    machine: "sends noise after its identification",
    lies: () => ({
      connection: send(() => [
        Buffer.from("SSH-2.0-liar\r\n"),
        Buffer.from(noise(2 ** 16)),
      ]),
    }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "shows another host key",
    lies: () => ({ otherHostKey: true }),
    answer: "postpone",
    says: /server at '.*' returned host key '/,
    quick: true,
  },
  {
    machine: "shows another host key and keeps the line, after the answer",
    lies: () => ({ otherHostKey: true }),
    late: true,
    says: /server at '.*' returned host key '/,
  },
  {
    machine: "talks HTTP and waits, after the answer",
    lies: () => ({
      connection: send(() => [Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")]),
    }),
    late: true,
    says: /failed to connect to /,
    quick: true,
  },
  {
    machine: "says nothing, after the answer",
    lies: () => ({ connection: () => {} }),
    late: true,
    says: /failed to connect to .*[Tt]imed out/,
  },
  {
    machine: "closes after the key exchange",
    lies: () => ({ stops: { "key exchange": "closes" } }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "closes at the authentication",
    lies: () => ({ stops: { authentication: "closes" } }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "does not answer the authentication",
    lies: () => ({ stops: { authentication: "is silent" } }),
    late: true,
    says: /failed to connect to .*[Tt]imed out/,
  },
  {
    machine: "refuses the key",
    lies: () => ({ stops: { authentication: "refuses" } }),
    answer: "postpone",
    says: /public key authentication failed for '/,
  },

  // What it says of itself. It may lie; it may not do harm.
  {
    machine: "closes at the probe and whenever it is asked again",
    lies: () => ({ stops: { probe: "closes", daemon: "closes" } }),
    answer: "postpone",
    says: /failed to connect to '/,
  },
  {
    machine: "does not answer the probe",
    lies: () => ({ stops: { probe: "is silent" } }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "prints megabytes for the probe",
    lies: () => ({
      facts: () => mebibytes(400),
      stops: { daemon: "closes" },
    }),
    answer: "postpone",
    says: /failed to connect to '/,
    quick: true,
  },
  {
    machine: "prints to the probe's standard error without end",
    lies: () => ({ complaints: () => endless(MEBIBYTE) }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "prints absurd numbers for the probe",
    lies: () => ({
      facts: () =>
        Buffer.from(
          "cores 0\nload -1 x\nmemory NaN 1e999 kB\nstore-bytes a b c 1e400\n" +
            "store-inodes - - - -1\nclock -1e300\nuname \0\x1b[2J\n__proto__ 1\n",
        ),
      stops: { daemon: "closes" },
    }),
    answer: "postpone",
    says: /failed to connect to '/,
  },

  // The way to its daemon.
  {
    machine: "refuses all channels",
    lies: () => ({
      stops: { probe: "refuses", daemon: "refuses", command: "refuses" },
    }),
    answer: "postpone",
    says: /failed to connect to guix-daemon on '/,
    quick: true,
  },
  {
    machine: "closes when the daemon is asked for",
    lies: () => ({ stops: { daemon: "closes" } }),
    answer: "postpone",
    says: /failed to connect to '/,
  },
  {
    machine: "does not open a channel to the daemon",
    lies: () => ({ stops: { daemon: "is silent", command: "is silent" } }),
    answer: "postpone",
    says: /guix-daemon on '.*no answer/,
  },

  // A daemon that is none.
  {
    machine: "has a daemon that never answers",
    lies: () => ({ daemon: () => {} }),
    answer: "postpone",
    says: /failed to connect to guix-daemon on '.*no answer/,
    quick: true,
  },
  {
    machine: "has a daemon that greets wrongly",
    lies: () => ({ daemon: daemonSays(encode(1, 2, 3)) }),
    answer: "postpone",
    says: /guix-daemon on '.*unexpected greeting/,
  },
  {
    machine: "has a daemon of another protocol",
    lies: () => ({ daemon: daemonSays(encode(0x6478696f, 0x364, 1)) }),
    answer: "postpone",
    says: /guix-daemon on '.*unsupported protocol/,
  },
  {
    machine: "has a daemon that says random bytes",
    lies: () => ({ daemon: daemonSays(Buffer.from(noise(2 ** 20))) }),
    answer: "postpone",
    says: /guix-daemon on '/,
  },
  {
    machine: "has a daemon that complains without end",
    lies: () => ({ daemon: flood }),
    answer: "postpone",
    says: /guix-daemon on '.*no answer/,
    quick: true,
  },
  {
    machine: "greets with a log without end",
    lies: () => ({
      answers: {
        greeting: () => endless(encode(0x6478696f, 0x164), LOG, LOG),
      },
    }),
    answer: "postpone",
    says: /guix-daemon on '/,
  },
  {
    machine: "answers an operation with a log without end",
    lies: () => ({ answers: { setOptions: () => endless(LOG) } }),
    says: /guix-daemon on '.*too many messages/,
    quick: true,
  },
  {
    machine: "answers with empty messages without end",
    lies: () => ({
      answers: {
        setOptions: () =>
          endless(Buffer.concat(Array(4096).fill(encode(STDERR.next, "")))),
      },
    }),
    says: /guix-daemon on '.*too many messages/,
  },
  {
    machine: "answers with a message of an absurd length",
    lies: () => ({
      answers: {
        setOptions: () => mebibytes(64, encode(STDERR.next, 2 ** 40)),
      },
    }),
    says: /guix-daemon on '.*unexpected number/,
  },
  {
    machine: "answers with gigabytes of store items",
    lies: () => ({
      answers: {
        queryValidPaths: () =>
          endless(
            encode(STDERR.last, 2 ** 20),
            Buffer.concat(Array(200).fill(encode("x".repeat(4096)))),
          ),
      },
    }),
    answer: "postpone",
    says: /guix-daemon on '.*(too long|unexpected)/,
    quick: true,
  },
  {
    machine: "fails with an error that looks like an answer to the daemon",
    lies: () => ({
      answers: {
        setOptions: () => encode(STDERR.error, "\x1b[2J\n# decline\n", 1),
      },
    }),
    says: /error: .*\n {2}# decline/,
    quick: true,
  },
  {
    machine: "fails with an error as long as one may be",
    lies: () => ({
      answers: { setOptions: () => encode(STDERR.error, MEBIBYTE, 1) },
    }),
    says: /error: .*xxx/,
  },
  {
    machine: "fails with an error without a status",
    lies: () => ({
      answers: { setOptions: () => encode(STDERR.error, "disk full") },
    }),
    says: /lost connection to '/,
  },
  {
    machine: "answers a build with a code that there is not",
    lies: () => ({ answers: { buildThings: () => encode(4711) } }),
    says: /guix-daemon on '.*unexpected message/,
  },
  {
    machine: "asks for data when there is none",
    lies: () => ({ answers: { buildThings: () => encode(STDERR.read, 8) } }),
    says: /guix-daemon on '.*unexpected message/,
  },
  {
    machine: "says the build failed for good",
    lies: () => ({
      answers: { buildThings: () => encode(STDERR.error, "it failed", 100) },
    }),
    status: 100,
    says: /offloaded to '.*' failed: it failed/,
  },
  {
    machine: "says the build failed with an absurd status",
    lies: () => ({
      answers: {
        buildThings: () => encode(STDERR.error, "it failed", 2 ** 40),
      },
    }),
    says: /offloaded to '.*' failed: it failed/,
  },
];
