// Threads that make garbage, compress it and compute its checksum, always of the same content: it must not change.
//
//     node churn.js PROGRESS RESULT
//
// Runs until SIGTERM; then writes "OK ..." or "FAIL ..." to RESULT. Every line of PROGRESS is a round of a thread.

"use strict";
const { Worker, isMainThread, parentPort, workerData } = require("node:worker_threads");
const crypto = require("node:crypto");
const fs = require("node:fs");
const zlib = require("node:zlib");

const THREADS = 3;
const ENTRIES = 3000;

function round(seed) {
    const map = new Map();
    for (let i = 0; i < ENTRIES; i++) {
        map.set(`key ${seed} ${i}`, { values: [i, seed ^ i], text: "x".repeat(i % 50) });
    }
    const compressed = zlib.deflateSync(JSON.stringify([...map]));
    return crypto.createHash("sha256").update(zlib.inflateSync(compressed)).digest("hex");
}

function work() {
    const wanted = round(workerData);
    (function again() {
        const found = round(workerData);
        parentPort.postMessage({ number: workerData, problem: found === wanted ? "" : `${found}, not ${wanted}` });
        setImmediate(again);
    })();
}

function main([progressPath, resultPath]) {
    const progress = fs.openSync(progressPath, "a");
    const rounds = new Array(THREADS).fill(0);
    let last = process.hrtime.bigint();
    let beats = 0;

    function finish(problem) {
        const idle = beats && rounds.every(Boolean) ? "" : ` (${beats} timers, ${rounds} rounds)`;
        fs.writeFileSync(resultPath, problem || idle ? `FAIL ${problem}${idle}` : `OK ${rounds} rounds`);
        process.exit(problem || idle ? 1 : 0);
    }

    process.on("SIGTERM", () => finish(""));
    setInterval(() => {
        const now = process.hrtime.bigint();
        if (now < last) finish("the clock went back");
        last = now;
        beats++;
    }, 5);
    for (let number = 0; number < THREADS; number++) {
        const worker = new Worker(__filename, { workerData: number });
        worker.on("error", (error) => finish(`thread ${number}: ${error}`));
        worker.on("message", (message) => {
            if (message.problem) finish(`thread ${number}: ${message.problem}`);
            rounds[number]++;
            fs.writeSync(progress, `${number}\n`);
        });
    }
}

if (isMainThread) main(process.argv.slice(2));
else work();
