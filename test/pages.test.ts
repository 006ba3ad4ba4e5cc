/** README.md and the pages beside plugins/README.md: that they hold together. */

import { existsSync, globSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ROOT } from "./helpers.ts";

const test = suite("pages");

/** All pages, as they are named from the checkout. */
const PAGES = ["README.md", "CHANGELOG.md"]
  .concat(globSync("plugins/*.md", { cwd: ROOT }).sort());

/** The text of a page, without what only looks like headings and links. */
function textOf(page: string): string {
  return readFileSync(`${ROOT}/${page}`, "utf8").replace(
    /^```[^]*?^```$/gm,
    "",
  );
}

/** The headings of a level or, without one, of all. */
function headings(page: string, level = "#+"): string[] {
  const pattern = new RegExp(`^${level} (.*)$`, "gm");
  return [...textOf(page).matchAll(pattern)].map(([, title]) => title!);
}

/** What a heading is linked by. */
function anchorOf(title: string): string {
  return title.toLowerCase().replace(/[^\w\- ]/g, "").replaceAll(" ", "-");
}

/** What a page links, images as well. */
function linksOf(page: string): string[] {
  return [...textOf(page).matchAll(/\]\(([^)\s]+)\)/g)].map(([, it]) => it!);
}

/** The file that a link on a page leads to, and the place there. */
function follow(page: string, link: string): [file: string, anchor?: string] {
  const [file, anchor] = link.split("#");
  const target = file === "" ? page : join(dirname(page), file!);
  return anchor === undefined ? [target] : [target, anchor];
}

/** What README.md links in the checkout. */
const LINKED = linksOf("README.md").filter((link) => !/^https?:/.test(link))
  .map((link) => follow("README.md", link)[0]);

/** The cells of each row of a table on a page, by what its head begins with. */
function rowsOf(page: string, head: string): string[][] {
  const text = textOf(page);
  const table = text.slice(text.indexOf(`\n${head}`) + 1).split("\n\n")[0]!;
  return table.split("\n").slice(2)
    .map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

test("links lead somewhere", () => {
  for (const page of PAGES) {
    for (const link of linksOf(page)) {
      if (/^https?:/.test(link)) continue;
      const [file, anchor] = follow(page, link);
      assert.ok(existsSync(`${ROOT}/${file}`), `${page}: ${link}`);
      if (anchor === undefined) continue;
      const anchors = headings(file).map(anchorOf);
      assert.ok(anchors.includes(anchor), `${page}: ${link}`);
    }
  }
});

test("README.md lists its sections, and leads to all pages", () => {
  const links = linksOf("README.md");
  const sections = headings("README.md", "##").map((it) => `#${anchorOf(it)}`);
  const listed = links.filter((link) => sections.includes(link));
  assert.equal([...new Set(listed)], sections);
  const missing = PAGES.filter((it) => it !== "README.md")
    .filter((page) => !LINKED.includes(page));
  assert.equal(missing, []);
});

test("what README.md leads to is in the packages for npm and JSR", () => {
  const read = (name: string) =>
    JSON.parse(readFileSync(`${ROOT}/${name}`, "utf8"));
  const lists: Record<string, string[]> = {
    npm: read("package.json").files,
    JSR: read("deno.json").publish.include,
  };
  for (const [name, patterns] of Object.entries(lists)) {
    const published = globSync(patterns, { cwd: ROOT });
    const missing = LINKED.filter((file) => file !== "README.md")
      .filter((file) =>
        !published.includes(file) && !published.includes(dirname(file))
      );
    assert.equal(missing, [], `they are not in the package for ${name}`);
  }
});

test("the figures of README.md are those of the tables", () => {
  const page = "plugins/measurements.md";
  const text = textOf("README.md").replace(/\s+/g, " ");
  const build = (head: string) =>
    rowsOf(page, head).find(([work]) => work === "one trivial build")!;
  const [, reference, cold] = build(
    "| work | guix offload | Node, cold | Deno",
  );
  const [, , , warm] = build("| work | guix offload | Node, cold | Node, warm");
  const [time, ratio] = cold!.split(/ \(|x\)/);
  const [, warmRatio] = warm!.split(/ \(|x\)/);
  assert.match(
    text,
    `takes ${reference} with \`guix offload\` and ${time} with`,
  );
  assert.match(text, `, ${ratio} times as fast; with the process that stays`);
  assert.match(text, `that stays, ${warmRatio} times as fast.`);

  const faults = rowsOf(page, "| fault | guix offload |");
  const count = (column: 1 | 2, what: string) =>
    faults.filter((row) => row[column]!.startsWith(what)).length;
  assert.match(
    text,
    `of ${faults.length} faults, \`guix offload\` hangs in ` +
      `${count(1, "hangs")} and fails the build in ${count(1, "fails")}; ` +
      `Offload hangs in none and fails it in ${count(2, "fails")},`,
  );
  assert.is(count(2, "hangs"), 0);
});

test.run();
