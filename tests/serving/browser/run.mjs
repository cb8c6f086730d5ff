// node run.mjs EXPORTS MODULES SCREENSHOTS [VERSION ...]
//
// Opens page.html in headless Chromium for every version of transformers.js, with the folders that export_cases.py
// wrote, and waits for what it finds. Takes a screenshot a version; the status is 1 if an answer differs.
// EXPORTS and MODULES (the installed node_modules) are served on 127.0.0.1 alone.
import { execFileSync } from "node:child_process";
import { createReadStream, existsSync, mkdirSync, readFileSync, realpathSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, extname, join, resolve, sep } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const TIMEOUT_MS = 180_000;
const [exportsFolder, modulesFolder, screenshots, ...chosen] = process.argv.slice(2);
const versions = chosen.length ? chosen : ["4.3", "4.2"];
const modules = realpathSync(modulesFolder);
const here = dirname(fileURLToPath(import.meta.url));
const roots = { exports: resolve(exportsFolder), modules, page: here };
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".wasm": "application/wasm",
};

function chromium() {
  const names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"];
  if (process.env.BROWSER_PATH) return process.env.BROWSER_PATH;
  for (const name of names) {
    try {
      return execFileSync("which", [name], { encoding: "utf8" }).trim();
    } catch {}
  }
  console.error(`No browser was found (${names.join(", ")}). Install Chromium, or name one with BROWSER_PATH=...`);
  process.exit(2);
}

function serve(request, response) {
  const [, root, ...rest] = decodeURIComponent(new URL(request.url, "http://x").pathname).split("/");
  const file = resolve(roots[root] ?? "/nowhere", ...rest);
  const inside = roots[root] && file.startsWith(roots[root] + sep);
  if (!inside || !existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, {
    "content-type": TYPES[extname(file)] ?? "application/octet-stream",
    "content-length": statSync(file).size,
  });
  createReadStream(file).pipe(response);
}

// Where a package's own copy of another lies: beside it, or in the common folder.
function place(owner, name) {
  for (const folder of [join(owner, "node_modules", name), name]) {
    if (existsSync(join(modules, folder))) return `/modules/${folder}`;
  }
  throw new Error(`${name} is not installed in ${modules}`);
}

function packageVersion(path) {
  return JSON.parse(readFileSync(join(modules, path.replace("/modules/", ""), "package.json"))).version;
}

const { default: puppeteer } = await import(
  pathToFileURL(createRequire(join(modules, "x.js")).resolve("puppeteer-core"))
);
mkdirSync(screenshots, { recursive: true });
const server = createServer(serve);
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const browser = await puppeteer.launch({
  executablePath: chromium(),
  headless: true,
  args: ["--disable-dev-shm-usage", ...(process.getuid?.() === 0 ? ["--no-sandbox"] : [])],
});
let failed = 0;
try {
  for (const version of versions) {
    const owner = `transformers-${version}`;
    const runtime = place(owner, "onnxruntime-web");
    const setup = {
      transformers: `/modules/${owner}/dist/transformers.web.js`,
      common: `${place(owner, "onnxruntime-common")}/dist/esm/index.js`,
      runtime: `${runtime}/dist/`,
      versions: { "transformers.js": packageVersion(owner), "onnxruntime-web": packageVersion(runtime) },
    };
    const page = await browser.newPage();
    await page.setViewport({ width: 1040, height: 400, deviceScaleFactor: 2 });
    page.on("pageerror", (error) => console.error(`page: ${error.message}`));
    page.on("requestfailed", (each) => console.error(`page: ${each.url()} ${each.failure()?.errorText}`));
    const { port } = server.address();
    await page.goto(`http://127.0.0.1:${port}/page/page.html#${encodeURIComponent(JSON.stringify(setup))}`);
    await page.waitForFunction("window.results !== undefined", { timeout: TIMEOUT_MS });
    const results = await page.evaluate("window.results");
    await page.screenshot({ path: join(screenshots, `${owner}.png`), fullPage: true });
    const about = Object.entries(setup.versions).map((pair) => pair.join(" ")).join(", ");
    for (const { name, passed, text } of results) {
      failed += !passed;
      console.log(`${about}  ${name.padEnd(20)} ${passed ? "" : "FAILED: "}${text}`);
    }
    await page.close();
  }
} finally {
  await browser.close();
  server.close();
}
process.exit(failed ? 1 : 0);
