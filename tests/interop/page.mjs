// The status page in a real browser. Run by hand, outside CI:
//
//   node tests/interop/page.mjs http://127.0.0.1:29402/ DIRECTORY [TOKEN]
//
// It needs a running job (4 ranks that train are meant) with --http-listen, Node 18, a Chromium (CHROMIUM names it; by default
// /usr/bin/chromium), and from npm `puppeteer-core` and `axe-core` in a directory that NODE_PATH names. The page is opened at
// 1280 and 375 px, light and dark. It must get two updates without being loaded again, say nothing on the console, ask nobody
// else for anything, not be wider than the screen, and have no serious finding of axe. Screenshots go to DIRECTORY.

import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_PATH ?? process.cwd(), "x.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const [address, directory, token] = process.argv.slice(2);
if (!address || !directory) {
  console.error("usage: node page.mjs ADDRESS DIRECTORY [TOKEN]");
  process.exit(64);
}
mkdirSync(directory, { recursive: true });
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"],
});
const faults = [];

async function look(width, height, scheme) {
  const name = `${width}-${scheme}`;
  const page = await browser.newPage();
  const fault = (text) => faults.push(`${name}: ${text}`);
  let asksForToken = Boolean(token);
  page.on("console", (message) => {
    // The answer 401 to the first request is how a browser learns that it needs the token.
    if (["error", "warn", "warning"].includes(message.type()) && !asksForToken) fault(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => fault(`script: ${error.message}`));
  page.on("request", (request) => {
    const { origin, protocol } = new URL(request.url());
    if (origin !== new URL(address).origin && protocol !== "data:") fault(`asks ${request.url()}`);
  });
  await page.setViewport({ width, height, deviceScaleFactor: 2 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const messages = (count) =>
    page.waitForFunction((n) => Number(document.documentElement.dataset.messages ?? 0) >= n, { timeout: 20000 }, count);
  await page.goto(address + (token ? `#token=${encodeURIComponent(token)}` : ""), { waitUntil: "domcontentloaded" });
  await messages(1);
  asksForToken = false;
  if (token && (await page.evaluate(() => location.hash)) !== "") fault("the token is still in the address");
  // A mark that only a reload would remove.
  await page.evaluate(() => { window.notLoadedAgain = true; });
  await messages(4);
  if (!(await page.evaluate(() => window.notLoadedAgain === true))) fault("the page was loaded again");
  const [wide, screen] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  if (wide > screen) fault(`the page is ${wide} px wide on a screen of ${screen}`);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  for (const { id, impact, help, nodes } of violations) {
    const line = `axe: ${impact}: ${id}: ${help}: ${nodes.map((node) => node.target.join(" ")).join(", ")}`;
    if (["serious", "critical"].includes(impact)) fault(line);
    else console.log(`${name}: ${line}`);
  }
  await page.screenshot({ path: join(directory, `page-${name}.png`), fullPage: true });
  await page.close();
}

try {
  for (const scheme of ["light", "dark"]) {
    await look(1280, 900, scheme);
    await look(375, 812, scheme);
  }
} finally {
  await browser.close();
}
if (faults.length > 0) {
  console.error(faults.join("\n"));
  process.exit(1);
}
console.log(`the page is well; screenshots are in ${directory}`);
