// The demo in a headless Chromium, as a visitor uses it: `make test-browser`, or
//     node tests/browser/demo.mjs PYTHON [FOLDER FOR SCREENSHOTS]
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const [python, screenshots] = process.argv.slice(2);
const repository = resolve(fileURLToPath(import.meta.url), "../../..");
const scratch = mkdtempSync(join(tmpdir(), "erw-demo-"));

// Models of other kinds than the digits: without classes, with a scheduler of diffusers; and of the latents of an autoencoder.
const TINY = `
import sys, torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
torch.manual_seed(0)
size = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
levels = {f"{way.lower()}_block_types": (f"{way}{'Encoder' if way == 'Down' else 'Decoder'}Block2D",) * 2 for way in ("Down", "Up")}
vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **levels)
for name, config, vae, scheduler in (
    ("unconditional", {"in_channels": 3, "num_classes": 0}, None, FlowMatchEulerDiscreteScheduler()),
    ("latent", {"in_channels": 4, "num_classes": 10}, vae, FlowMatchEulerMaruyamaScheduler()),
):
    model = ERWTransformer2DModel(**size, **config)
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    ERWPipeline(model, vae, scheduler).save_pretrained(f"{sys.argv[1]}/{name}")
`;

async function serve() {
  const probe = createServer().listen(0, "127.0.0.1");
  await new Promise((done) => probe.on("listening", done));
  const { port } = probe.address();
  await new Promise((done) => probe.close(done));
  // The twin is the digits by another name: at the same seeds it has to draw the same.
  cpSync(join(repository, "pipelines/erw-digits"), join(scratch, "twin"), { recursive: true });
  execFileSync(python, ["-c", TINY, scratch], { cwd: repository, stdio: ["ignore", "ignore", "inherit"] });
  const models = ["twin", "unconditional", "latent"].map((name) => join(scratch, name)).join(",\n");
  const server = spawn(python, ["spaces/erw/app.py"], {
    cwd: repository,
    stdio: ["ignore", "inherit", "inherit"],
    env: {
      ...process.env, ERW_MODEL: "", ERW_MODELS: models, HF_HUB_OFFLINE: "1", GRADIO_SERVER_PORT: `${port}`,
      GRADIO_TEMP_DIR: join(scratch, "gradio"),
    },
  });
  const url = `http://127.0.0.1:${port}/`;
  for (let i = 0; i < 720; i++) {
    if (server.exitCode !== null) throw new Error("the demo did not start");
    if (await fetch(url).then((answer) => answer.ok, () => false)) return { server, url };
    await new Promise((done) => setTimeout(done, 250));
  }
  throw new Error("the demo did not answer within three minutes");
}

const link = (settings) => "?" + new URLSearchParams({ model: "erw-digits", ...settings });
const captions = (page, gallery) => page.locator(`${gallery} .caption-label`).allTextContents();
const field = (page, id) => page.locator(`${id} input`).first();

// A digest of the pixels of every image of a gallery, once all are loaded.
async function pictures(page, gallery) {
  const images = `${gallery} .grid-container img`;
  await page.waitForFunction((all) => [...document.querySelectorAll(all)].every((i) => i.complete && i.naturalWidth), images);
  return page.$$eval(images, (all) =>
    Promise.all(
      all.map(async (image) => {
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
        canvas.drawImage(image, 0, 0);
        const pixels = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
        return btoa(String.fromCharCode(...new Uint8Array(await crypto.subtle.digest("SHA-256", pixels))));
      }),
    ),
  );
}

async function ready(page, address) {
  await page.goto(address);
  await page.waitForSelector("body[data-opened]");
}

// A run is over when what it made is among what was made in this visit.
const remembered = (page, count) =>
  page.waitForFunction((n) => document.querySelectorAll("#history .grid-container img").length === n, count);

const checks = {
  async "it opens with the emoji"(page, url) {
    await ready(page, url);
    assert.equal(await field(page, "#model").inputValue(), "erw-emoji");
  },

  async "a class is searched for and drawn, by keyboard alone"(page, url) {
    await ready(page, url + link({ num_images: 4, num_inference_steps: 10 }));
    await page.focus("#label input");
    await page.keyboard.press("Control+A");
    await page.keyboard.type("7");
    await page.waitForFunction(() => document.querySelectorAll("#label [role=option]").length === 1);
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => !document.querySelector("#label [role=option]"));
    await page.keyboard.press("Control+Enter");
    await remembered(page, 4);
    const seed = Number(await field(page, "#seed").inputValue());
    assert.deepEqual(await captions(page, "#pictures"), [0, 1, 2, 3].map((i) => `7, seed ${seed + i}`));
    assert.equal(new Set(await pictures(page, "#pictures")).size, 4);
    const look = await page.$eval("#pictures .grid-container img", (image) => [
      image.naturalWidth, getComputedStyle(image).imageRendering, image.clientWidth > 64,
    ]);
    assert.deepEqual(look, [32, "pixelated", true]); // small, shown enlarged, with its own pixels
  },

  async "the address draws the same again"(page, url) {
    await ready(page, url + link({ label: 3, num_images: 2, seed: 11, num_inference_steps: 8, sampler: "heun", guidance_high: 0.5 }));
    await remembered(page, 2);
    const [address, before] = [page.url(), await pictures(page, "#pictures")];
    await page.reload();
    await remembered(page, 2);
    assert.equal(page.url(), address);
    assert.deepEqual(await captions(page, "#pictures"), ["3, seed 11", "3, seed 12"]);
    assert.deepEqual(await pictures(page, "#pictures"), before);
    assert.equal(await page.isChecked("#new-seed input"), false);
    await page.click("#link");
    assert.equal(await page.evaluate(() => navigator.clipboard.readText()), address);
  },

  async "a picture that was made gives its settings back"(page) {
    await page.getByRole("button", { name: "Sampling and guidance" }).click();
    await page.getByLabel("SDE, Euler-Maruyama").check();
    await page.click("#random");
    await page.locator("#history .grid-container button").nth(1).click();
    await page.waitForFunction(() => document.querySelector("#seed input").value === "12");
    assert.equal(await field(page, "#label").inputValue(), "3");
    assert.equal(await page.getByLabel("ODE, Heun").isChecked(), true);
    await page.getByText("Settings of 3, seed 12 restored.").waitFor();
    await page.click("#generate");
    await remembered(page, 4);
    const made = await pictures(page, "#history");
    assert.equal(made[0], made[3]); // newest first: seed 12 again
  },

  async "an image is downloaded in its own size, with its settings in it"(page) {
    await page.locator("#pictures .grid-container button").first().click();
    const [download] = await Promise.all([
      page.waitForEvent("download"),
      page.locator("#pictures").getByRole("button", { name: "Download", exact: true }).or(page.locator("#pictures a[download]")).first().click(),
    ]);
    const bytes = readFileSync(await download.path());
    assert.deepEqual([bytes.toString("latin1", 1, 4), bytes.readUInt32BE(16), bytes.readUInt32BE(20)], ["PNG", 32, 32]);
    assert.match(bytes.toString("latin1"), /"sampler": "heun"/);
    assert.equal(download.suggestedFilename(), "erw-digits-3-seed-12.png");
    await page.keyboard.press("Escape");
  },

  async "a run shows previews and stops"(page, url) {
    await ready(page, url + link({ num_images: 16, num_inference_steps: 250 }));
    await page.click("#generate");
    await page.waitForFunction(() => document.querySelectorAll("#pictures .grid-container img").length === 16);
    await page.getByText(/Step \d+ of 250/).waitFor();
    await page.click("#stop");
    await page.getByText("Stopped.").waitFor();
    await page.goto(url + link({ label: 1, num_images: 1, num_inference_steps: 2 })); // the machine is free again
    await remembered(page, 1);
  },

  async "two models draw the same seeds side by side"(page) {
    await page.getByRole("tab", { name: "Compare" }).click();
    await page.click("#second input");
    await page.getByRole("option", { name: "twin", exact: true }).click();
    await page.click("#compare");
    await remembered(page, 3);
    const [left, right] = [await pictures(page, "#left"), await pictures(page, "#right")];
    assert.equal(left.length, 1);
    assert.deepEqual(left, right);
  },

  async "an image forms from noise"(page, url) {
    await ready(page, url + link({ num_inference_steps: 12 }));
    await page.getByRole("tab", { name: "Watch" }).click();
    await page.click("#form");
    await page.waitForFunction(() => document.querySelectorAll("#clean .grid-container img").length === 8);
    const [noisy, clean] = [await pictures(page, "#noisy"), await pictures(page, "#clean")];
    assert.equal(new Set(noisy).size, 8);
    assert.equal(noisy[7], clean[7]);
    assert.equal((await captions(page, "#noisy"))[0], "t = 1.00");
  },

  async "a model without classes and one of latents draw at the first click"(page, url) {
    for (const [model, side, name, samplers] of [["unconditional", 8, "no class", 1], ["latent", 16, "0", 3]]) {
      await ready(page, url + link({ model, num_images: 2, num_inference_steps: 4 }));
      await page.click("#generate");
      await remembered(page, 2);
      const seed = Number(await field(page, "#seed").inputValue());
      assert.deepEqual(await captions(page, "#pictures"), [0, 1].map((i) => `${name}, seed ${seed + i}`));
      assert.equal(new Set(await pictures(page, "#pictures")).size, 2);
      assert.equal(await page.$eval("#pictures .grid-container img", (image) => image.naturalWidth), side);
      await page.getByRole("button", { name: "Sampling and guidance" }).click();
      await page.getByRole("radio").first().waitFor();
      assert.equal(await page.getByRole("radio").count(), samplers);
    }
  },

  async "another model takes over what it has of the settings"(page, url) {
    await ready(page, url + link({ label: 7, model: "latent", sampler: "heun", num_images: 1, num_inference_steps: 2 }));
    await remembered(page, 1);
    for (const [model, name] of [["unconditional", "no class"], ["latent", "0"]]) {
      await page.click("#model input");
      await page.getByRole("option", { name: model, exact: true }).click();
      await page.waitForFunction((value) => document.querySelector("#label input").value === value, name);
      await page.click("#generate");
      await remembered(page, model === "latent" ? 3 : 2);
    }
  },

  async "a hostile link is refused and not run"(page, url) {
    const hostile = "<img src=x onerror='window.harm = true'>";
    await ready(page, url + link({ label: hostile, model: "/etc", num_images: "9e9" }));
    await page.getByText("The settings in this link do not work").first().waitFor();
    await ready(page, url + link({ label: hostile }));
    await page.getByText("The settings in this link do not work").first().waitFor();
    assert.equal(await page.evaluate(() => window.harm), undefined);
    assert.equal(await field(page, "#label").inputValue(), "0");
  },

  async "every control has a name"(page, url) {
    await ready(page, url);
    await page.getByRole("button", { name: "Sampling and guidance" }).click();
    const nameless = await page.$$eval("button, input, [role=tab]", (all) =>
      all
        .filter((one) => one.offsetParent && !one.textContent.trim())
        .filter((one) => !one.ariaLabel && !one.title && !one.labels?.length && !one.getAttribute("aria-labelledby"))
        .map((one) => one.outerHTML),
    );
    assert.deepEqual(nameless, []);
  },
};

// The sizes and colour schemes that the documentation shows.
async function look(browser, url, watch) {
  for (const [size, viewport] of [["desktop", { width: 1280, height: 900 }], ["phone", { width: 390, height: 844 }]]) {
    for (const colorScheme of ["light", "dark"]) {
      const page = await browser.newPage({ viewport, colorScheme });
      watch(page);
      await ready(page, url + link({ model: "erw-emoji", label: "face-smiling", seed: 5 }));
      await remembered(page, 8);
      await pictures(page, "#history");
      assert.equal(await page.evaluate(() => document.body.classList.contains("dark")), colorScheme === "dark");
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= viewport.width, `${size}: ${width} pixels wide`);
      const top = async (id) => (await page.locator(id).boundingBox()).y;
      if (size === "phone") assert.ok((await top("#generate")) < (await top("#pictures")) && (await top("#pictures")) < (await top("#seed")));
      if (screenshots) {
        await page.waitForTimeout(500);
        await page.screenshot({ path: join(screenshots, `demo-${size}-${colorScheme}.png`), fullPage: true });
      }
      await page.close();
    }
  }
}

const { server, url } = await serve();
let browser;
try {
  browser = await chromium.launch({
    executablePath: existsSync("/usr/bin/chromium") ? "/usr/bin/chromium" : process.env.CHROMIUM,
    args: [
      "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
    ],
  });
  const trouble = [];
  const watch = (page) => {
    page.setDefaultTimeout(60000);
    page.on("request", (request) => {
      if (!request.url().startsWith(url) && !/^(data|blob):/.test(request.url())) trouble.push(`asks ${request.url()}`);
    });
    page.on("response", (response) => response.status() < 400 || trouble.push(`${response.status()} ${response.url()}`));
    page.on("pageerror", (error) => trouble.push(error.message));
    // gradio's own words when a page is left while its stream is open.
    const left = /AbortError|Connection errored out/;
    page.on("console", (message) => message.type() !== "error" || left.test(message.text()) || trouble.push(message.text()));
  };
  const context = await browser.newContext({ permissions: ["clipboard-read", "clipboard-write"], acceptDownloads: true });
  const page = await context.newPage();
  watch(page);
  for (const [name, check] of Object.entries(checks)) {
    const start = Date.now();
    await check(page, url);
    console.log(`ok - ${name} (${((Date.now() - start) / 1000).toFixed(1)} s)`);
  }
  await look(browser, url, watch);
  console.log("ok - desktop and phone, light and dark");
  assert.deepEqual(trouble, [], "no request leaves this machine, none fails, and the console has no errors");
  console.log("ok - no request leaves this machine");
} finally {
  await browser?.close();
  server.kill();
  rmSync(scratch, { recursive: true, force: true });
}
