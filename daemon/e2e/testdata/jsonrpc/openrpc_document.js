// Validates the server's OpenRPC document against the official meta-schema.
const assert = require('node:assert/strict');
const { validateOpenRPCDocument } = require('@open-rpc/schema-utils-js');

async function main() {
  const response = await fetch(`${process.env.MSB_SERVER_URL}/api/v1/rpc`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${process.env.MSB_API_KEY}` },
    body: JSON.stringify({ jsonrpc: '2.0', method: 'rpc.discover', id: 1 }),
  });
  const document = (await response.json()).result;
  assert.equal(validateOpenRPCDocument(document), true);
  assert.ok(document.methods.length >= 5);
  for (const method of document.methods) {
    for (const { $ref } of method.errors) {
      assert.ok(document.components.errors[$ref.split('/').pop()], $ref);
    }
  }
  // Check that the validator refuses an invalid document.
  delete document.methods[0].params;
  assert.notEqual(validateOpenRPCDocument(document), true);
  console.log(`OpenRPC ${document.openrpc}: ${document.methods.length} methods, valid`);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
