// Opens the page of docs/onnx-page in headless Chromium, as a user would: chooses a file, asks,
// and prints the answer as JSON, with the requests that left the page's origin.
//
//     node page.mjs CHROMIUM URL IMAGE QUESTION

import puppeteer from "puppeteer-core";

const [executablePath, url, picture, question] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu"];
const browser = await puppeteer.launch({ executablePath, headless: true, args });
try {
  const page = await browser.newPage();
  const origin = new URL(url).origin;
  const outside = [];
  page.on("request", (request) => {
    const { protocol, origin: from } = new URL(request.url());
    if (protocol.startsWith("http") && from !== origin) outside.push(request.url());
  });
  page.on("console", (message) => console.error(message.text()));
  page.on("pageerror", (error) => console.error(String(error)));
  await page.goto(url);
  const loaded = () => document.getElementById("status").textContent !== "loading …";
  await page.waitForFunction(loaded, { timeout: 300_000 });
  const status = await page.$eval("#status", (element) => element.textContent);
  if (status !== "ready") throw new Error(status);
  await (await page.$("#file")).uploadFile(picture);
  // the picture moves the button when it appears, away from under a click
  const shown = () => document.getElementById("picture").naturalWidth > 0;
  await page.waitForFunction(shown, { timeout: 60_000 });
  await page.$eval("#question", (element, text) => (element.value = text), question);
  await page.click("#ask");
  const answered = () =>
    !document.getElementById("ask").disabled && document.getElementById("answer").textContent;
  await page.waitForFunction(answered, { timeout: 300_000 });
  const text = await page.$eval("#answer", (element) => element.textContent);
  console.log(JSON.stringify({ text, outside }));
} finally {
  await browser.close();
}
