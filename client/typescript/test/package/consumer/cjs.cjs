const sdk = require("microsandbox");

console.log(Object.keys(sdk).sort().join(" "));
console.log(require("microsandbox/package.json").name);
