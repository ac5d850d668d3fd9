package mcp

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// maxImageFile is the size of the largest image file that a model gets, in bytes.
const maxImageFile = 2 << 20

// maxListing limits the list of a directory, in bytes.
const maxListing = 50_000

// imageTypes are the types of images that models can see.
var imageTypes = map[string]bool{"image/png": true, "image/jpeg": true, "image/gif": true, "image/webp": true}

// readFile reads a part of a text file, or an image.
func readFile(c *toolCall) (*sdk.CallToolResult, *rpc.Error) {
	length, rpcErr := c.take(fileLength)
	if rpcErr != nil {
		return nil, rpcErr
	}
	content, size, rpcErr := c.readBytes(map[string]any{"length": length})
	if rpcErr != nil {
		return nil, rpcErr
	}
	var params struct {
		Path   string `json:"path"`
		Offset int    `json:"offset"`
	}
	params = decode[struct {
		Path   string `json:"path"`
		Offset int    `json:"offset"`
	}](c.params(nil)) // the method has accepted them
	begin, name := params.Offset, bounded.Short(params.Path)
	if kind := http.DetectContentType(content); begin == 0 && imageTypes[kind] {
		return c.readImage(name, kind, size)
	}
	text := wholeRunes(content, begin > 0, begin+len(content) < size)
	if bytes.IndexByte(text, 0) >= 0 || !utf8.Valid(text) {
		return nil, &rpc.Error{Code: rpc.CodeConflict, Message: fmt.Sprintf("%q is not text but a binary file (%d bytes); "+
			"read it with code or a command in the sandbox", name, size)}
	}
	next := begin + len(text)
	if first := len(content) - len(bytes.TrimLeftFunc(content, isContinuation)); begin > 0 {
		next = begin + min(first, utf8.UTFMax-1) + len(text)
	}
	note := ""
	switch {
	case next < size:
		note = fmt.Sprintf("(%d of %d bytes; to read on, call again with offset %d)", len(text), size, next)
	case len(text) == 0 && size == 0:
		note = "(the file is empty)"
	case len(text) == 0:
		note = fmt.Sprintf("(nothing follows: the file has %d bytes)", size)
	}
	meta := map[string]any{"size": size, "next": next}
	switch {
	case note == "":
		return c.textResult(meta, string(text))
	case len(text) == 0:
		return c.textResult(meta, note)
	}
	return c.textResult(meta, string(text), note)
}
