package rpc

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Contexts is the part of Sandboxes for contexts, as in sandbox.Contexts.
type Contexts interface {
	CreateContext(context.Context, sandbox.Name, sandbox.ContextRequest) (sandbox.Context, error)
	ListContexts(context.Context, sandbox.Name) ([]sandbox.Context, error)
	RestartContext(ctx context.Context, n sandbox.Name, name string) (sandbox.Context, error)
	RemoveContext(ctx context.Context, n sandbox.Name, name string) error
}

// languages has every name that clients may use for a language.
var languages = map[string]sandbox.Language{
	"python": sandbox.Python, "python3": sandbox.Python, "py": sandbox.Python,
	"node": sandbox.Node, "nodejs": sandbox.Node, "javascript": sandbox.Node, "js": sandbox.Node,
	"typescript": sandbox.Node, "ts": sandbox.Node,
	"bash": sandbox.Bash, "sh": sandbox.Bash,
}

// languageNames has the name of each language in results.
var languageNames = map[sandbox.Language]string{sandbox.Python: "python", sandbox.Node: "node", sandbox.Bash: "bash"}

func parseLanguage(name string) (sandbox.Language, error) {
	language, ok := languages[name]
	if !ok {
		return "", fmt.Errorf("language %q is not supported; use python, node or bash: %w", bounded.Short(name), errdefs.ErrInvalidArgument)
	}
	return language, nil
}

func (s *Service) runCode(ctx context.Context, c *call, namespace string, p rpc.ReplRunParams) (rpc.ReplRunResult, error) {
	code, err := parseCode(p)
	if err != nil {
		return rpc.ReplRunResult{}, err
	}
	n := sandbox.Name{Namespace: namespace, Name: p.Sandbox}
	s.keepOutput(ctx, c, n, p.User)
	f, err := c.run(p.Encoding, func() (sandbox.Process, error) {
		run, err := s.sandboxes.RunCode(ctx, n, code)
		if c.excerpt != nil && code.Results && errdefs.IsFailedPrecondition(err) {
			// A sandbox of an earlier version of msbd has no results. Most of an excerpt is text, which it has.
			code.Results = false
			run, err = s.sandboxes.RunCode(ctx, n, code)
		}
		return run, err
	})
	if err != nil {
		return rpc.ReplRunResult{}, err
	}
	status := rpc.StatusSuccess
	if f.exit.Code != 0 {
		status = rpc.StatusError
	}
	result := rpc.ReplRunResult{
		Status: status, Language: p.Language, Output: f.output,
		ExitCode: f.exit.Code, Count: int(f.exit.Runs), StateLost: f.exit.StateLost,
	}
	if p.Results && c.events == nil {
		result.Results, result.Error = f.reports.displays, f.reports.exception
	}
	return result, nil
}

func parseCode(p rpc.ReplRunParams) (code sandbox.Code, err error) {
	code = sandbox.Code{ID: p.RunID, Context: p.Context, Text: p.Code, Results: p.Results}
	switch {
	case p.Context == "" && p.Language == "":
		return code, fmt.Errorf("give a language (python, node or bash) or a context: %w", errdefs.ErrInvalidArgument)
	case p.Context != "" && p.User != "":
		return code, fmt.Errorf("user and context exclude each other, because a context has a user: leave out one of them: %w", errdefs.ErrInvalidArgument)
	case p.Language != "":
		if code.Language, err = parseLanguage(p.Language); err != nil {
			return code, err
		}
	}
	if code.Timeout, err = parseTimeout(p.Timeout); err != nil {
		return code, err
	}
	code.RunOptions, err = parseRunOptions(p.RunOptions, p.Grace)
	return code, err
}

func (s *Service) interruptCode(_ context.Context, _ *call, namespace string, p rpc.ReplInterruptParams) (res rpc.Empty, err error) {
	return res, s.sandboxes.InterruptCode(sandbox.Name{Namespace: namespace, Name: p.Sandbox}, p.RunID)
}

func (s *Service) createContext(ctx context.Context, c *call, namespace string, p rpc.ContextCreateParams) (res rpc.Context, err error) {
	req := sandbox.ContextRequest{Name: p.Context, User: p.User, Cwd: p.Cwd}
	if req.Language, err = parseLanguage(p.Language); err != nil {
		return res, err
	}
	var created sandbox.Context
	c.wait(func() {
		created, err = s.sandboxes.CreateContext(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, req)
	})
	return describeContext(created), err
}

func (s *Service) listContexts(ctx context.Context, c *call, namespace string, p rpc.ContextListParams) (res rpc.ContextListResult, err error) {
	var all []sandbox.Context
	c.wait(func() { all, err = s.sandboxes.ListContexts(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}) })
	res.Contexts = []rpc.Context{}
	for _, found := range all {
		res.Contexts = append(res.Contexts, describeContext(found))
	}
	return res, err
}

func (s *Service) restartContext(ctx context.Context, c *call, namespace string, p rpc.ContextRestartParams) (res rpc.Context, err error) {
	var restarted sandbox.Context
	c.wait(func() {
		restarted, err = s.sandboxes.RestartContext(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, p.Context)
	})
	return describeContext(restarted), err
}

func (s *Service) removeContext(ctx context.Context, c *call, namespace string, p rpc.ContextRemoveParams) (res rpc.ContextRemoveResult, err error) {
	c.wait(func() {
		err = s.sandboxes.RemoveContext(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, p.Context)
	})
	return res, err
}

func describeContext(c sandbox.Context) rpc.Context {
	return rpc.Context{
		Context: c.Name, Language: languageNames[c.Language], User: c.User, Cwd: c.Cwd, PID: int(c.PID), Count: int(c.Runs), Busy: c.Busy,
	}
}

// reports collects what code reports beside its output. A text that is cut off is dropped: the code was interrupted.
type reports struct {
	quota
	events *events // not nil if what is complete is sent as an event
	// excerpt, if it is not nil, gets everything that is complete as text. Only some images are kept as they are.
	excerpt *excerpt
	images  int // the size of the images that are kept
	// text is what has come of a JSON text that is not complete yet. open says that there is one.
	text []byte
	open bool

	displays  []rpc.Display // not nil, so that it is encoded as an array
	exception *rpc.Exception
}

// reportCost is how often each byte that code reports counts, because a response is held beside what it is made of.
const reportCost = 2

// add takes a piece, unless it returns an error.
func (r *reports) add(p sandbox.Piece) error {
	if p.First {
		r.text, r.open = nil, true
	}
	if !r.open {
		return errInvalidReport
	}
	needed := reportCost*len(p.Data) + lineCost
	if r.events != nil || r.excerpt != nil { // the memory of what was passed on is free again
		needed += reportCost*len(r.text) - r.size
	}
	if needed > 0 {
		if err := r.take(needed); err != nil {
			return err
		}
	}
	if r.text = append(r.text, p.Data...); !p.Last {
		return nil
	}
	text := r.text
	r.text, r.open = nil, false
	if p.Error {
		return r.addException(text)
	}
	return r.addDisplay(text)
}

// errInvalidReport means that the sandbox sent what no driver sends.
var errInvalidReport = &rpc.Error{Code: rpc.CodeRunFailed, Message: "the sandbox sent a result that is not valid"}

func (r *reports) addDisplay(text []byte) error {
	d, err := decodeDisplay(text)
	switch {
	case err != nil:
		return errInvalidReport
	case r.events != nil:
		return r.events.send(rpc.EventDisplay, d)
	case r.excerpt != nil:
		return r.addToExcerpt(d)
	}
	r.displays = append(r.displays, d)
	return nil
}

// maxFormats limits the formats of a value. Each of them takes memory, however short it is.
const maxFormats = 64

// decodeDisplay decodes a display. It refuses one with too many formats before it holds them.
func decodeDisplay(text []byte) (d rpc.Display, err error) {
	var parts struct {
		Data   jsontext.Value `json:"data"`
		IsMain bool           `json:"is_main"`
	}
	if err := json.Unmarshal(text, &parts, jsontext.AllowInvalidUTF8(true)); err != nil {
		return d, err
	}
	d = rpc.Display{Data: map[string]jsontext.Value{}, IsMain: parts.IsMain}
	members := jsontext.NewDecoder(bytes.NewReader(parts.Data), jsontext.AllowInvalidUTF8(true))
	if begin, err := members.ReadToken(); err != nil || begin.Kind() != '{' {
		return d, errInvalidReport
	}
	for members.PeekKind() != '}' {
		name, err := members.ReadToken()
		if err != nil {
			return d, err
		}
		format := name.String()
		value, err := members.ReadValue()
		if err != nil || len(d.Data) == maxFormats {
			return d, errInvalidReport
		}
		d.Data[format] = value.Clone()
	}
	return d, nil
}

func (r *reports) addException(text []byte) error {
	var e rpc.Exception
	if err := json.Unmarshal(text, &e, jsontext.AllowInvalidUTF8(true)); err != nil {
		return errInvalidReport
	}
	if r.events != nil {
		return r.events.send(rpc.EventException, e)
	}
	if r.excerpt != nil {
		return r.excerpt.add(sandbox.Output{Stream: sandbox.Stderr, Data: []byte(e.Traceback)})
	}
	r.exception = &e
	return nil
}

// The images of a run that an excerpt keeps. A base64 image exists several times until the response is sent.
const (
	maxImages      = 8
	maxImageBytes  = 2 << 20 // of one image, as base64
	maxImagesBytes = 4 << 20 // of all images
	imageCopies    = 5
)

// imageFormats are the formats of images that an excerpt keeps, the preferred one first.
var imageFormats = []string{"image/png", "image/jpeg"}

// textFormats are the formats of values that are text for a reader, the preferred one first.
var textFormats = []string{"text/plain", "text/markdown", "text/latex", "application/json", "text/html", "image/svg+xml"}

// addToExcerpt adds a value to the excerpt as text. Its image is kept.
func (r *reports) addToExcerpt(d rpc.Display) error {
	text := fmt.Sprintf("[a value that has no text: %s]", bounded.Short(strings.Join(slices.Sorted(maps.Keys(d.Data)), ", ")))
	hasText := false
	for _, format := range textFormats {
		if value, ok := d.Data[format]; ok {
			text, hasText = displayText(value), true
			break
		}
	}
	for _, format := range imageFormats {
		image, ok := d.Data[format]
		if !ok {
			continue
		}
		if len(r.displays) == maxImages || len(image) > maxImageBytes || r.images+len(image) > maxImagesBytes {
			text = fmt.Sprintf("[an image of %d KiB is left out, because a result has at most %d images of together %d MiB, and each has at most %d MiB]",
				len(image)>>10, maxImages, maxImagesBytes>>20, maxImageBytes>>20)
			break
		}
		if err := r.reserve(imageCopies * len(image)); err != nil {
			return err
		}
		r.images += len(image)
		r.displays = append(r.displays, rpc.Display{Data: map[string]jsontext.Value{format: image}, IsMain: d.IsMain})
		if !hasText {
			return nil
		}
		break
	}
	return r.excerpt.add(sandbox.Output{Stream: sandbox.Stdout, Data: []byte(text + "\n")})
}

// displayText returns the text of a JSON value.
func displayText(value jsontext.Value) string {
	if value.Kind() != '"' {
		return string(value)
	}
	return string(unquote(value))
}
