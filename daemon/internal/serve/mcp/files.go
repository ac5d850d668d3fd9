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

// maxList limits the text of a list, in bytes.
const maxList = 50_000

// imageTypes are the types of images that models can see.
var imageTypes = map[string]bool{"image/png": true, "image/jpeg": true, "image/gif": true, "image/webp": true}

// readFile reads a part of a text file, or an image.
func readFile(c *call) (*sdk.CallToolResult, *rpc.Error) {
	length, rpcErr := c.take(fileLength)
	if rpcErr != nil {
		return nil, rpcErr
	}
	content, size, rpcErr := c.readBytes(c.params(map[string]any{"length": max(length, utf8.UTFMax), "encoding": rpc.EncodingBase64}))
	if rpcErr != nil {
		return nil, rpcErr
	}
	params := decode[struct {
		Path   string
		Offset int
	}](c.params(nil)) // the method has accepted them
	if kind := http.DetectContentType(content); params.Offset == 0 && imageTypes[kind] {
		return c.readImage(params.Path, kind, size)
	}
	begin, end := wholeRunes(content, params.Offset > 0, params.Offset+len(content) < size)
	text := content[begin:end]
	if bytes.IndexByte(text, 0) >= 0 || !utf8.Valid(text) {
		return nil, &rpc.Error{Code: rpc.CodeConflict, Message: fmt.Sprintf("%q is not text but a binary file of %d bytes; "+
			"process it with code or a command in the sandbox", bounded.Short(params.Path), size)}
	}
	next := params.Offset + end
	meta := map[string]any{"size": size, "next_offset": next}
	switch {
	case next < size && end > 0:
		return c.textResult(meta, string(text), fmt.Sprintf("(%d of %d bytes; to read on, call again with offset %d)", len(text), size, next))
	case len(text) == 0:
		return c.textResult(meta, fmt.Sprintf("(no content at offset %d; the file has %d bytes)", params.Offset, size))
	}
	return c.textResult(meta, string(text))
}

// base64Copies is how many more copies of base64 exist while it is decoded.
const base64Copies = 2

// readBytes calls sandbox.fs.read with the encoding base64. It returns the bytes, and the size of the complete file.
func (c *call) readBytes(params []byte) (content []byte, size int, rpcErr *rpc.Error) {
	res, rpcErr := callMethod[rpc.FSReadResult](c, rpc.MethodFSRead, params)
	if rpcErr != nil {
		return nil, 0, rpcErr
	}
	if rpcErr := c.hold(base64Copies * len(res.Content)); rpcErr != nil {
		return nil, 0, rpcErr
	}
	content, _ = base64.StdEncoding.DecodeString(res.Content) // the method has encoded it
	return content, res.Size, nil
}

// readImage returns an image file. kind is its media type.
func (c *call) readImage(path, kind string, size int) (*sdk.CallToolResult, *rpc.Error) {
	if size > maxImageFile {
		return nil, &rpc.Error{Code: rpc.CodeConflict, Message: fmt.Sprintf("%q is an image of %d bytes, and only images of up to %d bytes can be shown; "+
			"make it smaller with code in the sandbox", bounded.Short(path), size, maxImageFile)}
	}
	image, _, rpcErr := c.readBytes(c.params(map[string]any{"length": maxImageFile, "encoding": rpc.EncodingBase64}))
	if rpcErr != nil {
		return nil, rpcErr
	}
	if rpcErr := c.hold(encodedCopies * base64.StdEncoding.EncodedLen(len(image))); rpcErr != nil {
		return nil, rpcErr
	}
	return &sdk.CallToolResult{
		Content: []sdk.Content{&sdk.ImageContent{Data: image, MIMEType: kind}}, Meta: sdk.Meta{resultMetaKey: map[string]any{"size": size}},
	}, nil
}

// wholeRunes returns where the complete characters of a part of a text begin and end. before and after say that the text was
// cut there.
func wholeRunes(p []byte, before, after bool) (begin, end int) {
	for before && begin < min(len(p), utf8.UTFMax-1) && !utf8.RuneStart(p[begin]) {
		begin++
	}
	end = len(p)
	for back := 1; after && back < utf8.UTFMax && end-back >= begin; back++ {
		if utf8.RuneStart(p[end-back]) {
			if !utf8.FullRune(p[end-back:]) {
				end -= back
			}
			break
		}
	}
	return begin, end
}

// listFiles lists a directory, one file in a line.
func listFiles(c *call) (*sdk.CallToolResult, *rpc.Error) {
	res, rpcErr := callMethod[rpc.FSListResult](c, rpc.MethodFSList, c.params(nil))
	if rpcErr != nil {
		return nil, rpcErr
	}
	lines := list{empty: "(the directory is empty)", more: "list a directory below it"}
	for _, f := range res.Entries {
		path := bounded.Text(f.Path, maxList)
		switch f.Type {
		case rpc.FileTypeDirectory:
			lines.add(path + "/")
		case rpc.FileTypeSymlink:
			lines.add(path + " -> " + bounded.Text(f.LinkTarget, maxList))
		case rpc.FileTypeFile:
			lines.add(fmt.Sprintf("%s (%d bytes)", path, f.Size))
		default:
			lines.add(path + " (no regular file)")
		}
	}
	return c.textResult(map[string]any{"entries": len(res.Entries)}, lines.String())
}

// list is a text of limited size with one thing in each line.
type list struct {
	empty, more string // the text for an empty list, and how to get the rest of a long one
	text        strings.Builder
	omitted     int
}

func (l *list) add(line string) {
	if l.omitted > 0 || l.text.Len()+len(line) > maxList {
		l.omitted++
		return
	}
	l.text.WriteString(strings.ReplaceAll(line, "\n", `\n`) + "\n")
}

func (l *list) String() string {
	switch {
	case l.omitted > 0:
		return fmt.Sprintf("%s(%d more; %s)", &l.text, l.omitted, l.more)
	case l.text.Len() == 0:
		return l.empty
	}
	return strings.TrimSuffix(l.text.String(), "\n")
}
