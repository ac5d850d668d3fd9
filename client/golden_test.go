package client

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
)

// The gateway's transcripts contain the server's real responses. The client understands each of them.
func TestGoldenResponses(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../daemon/internal/serve/rpc/testdata/*.txt")
	if err != nil || len(files) < 3 {
		t.Fatalf("transcripts: %q, %v", files, err)
	}
	codes := map[rpc.Code]int{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			answer, ok := strings.CutPrefix(strings.TrimSpace(line), "< ")
			status, body, _ := strings.Cut(answer, " ")
			if !ok || !strings.HasPrefix(body, "{") { // the response to a batch, or an empty one
				continue
			}
			var want rpc.Response
			if err := json.Unmarshal([]byte(body), &want); err != nil {
				t.Fatal(err)
			}
			code, _ := strconv.Atoi(status)
			c := &Client{HTTP: answering(reply{status: code, body: body, header: "X-Request-Id: ABC"})}
			got, err := post[jsontext.Value](t.Context(), c, request{method: "any"})
			if want.Error == nil {
				codes[0]++
				if err != nil || string(got) != string(want.Result) {
					t.Errorf("%s: got %s, %v", answer, got, err)
				}
				continue
			}
			codes[want.Error.Code]++
			e, _ := errors.AsType[*Error](err)
			if e == nil {
				t.Errorf("%s: got %v", answer, err)
			} else if diff := cmp.Diff(e, wantError(want.Error, code)); diff != "" {
				t.Errorf("%s: %s", answer, diff)
			} else if errors.Is(err, errdefs.ErrUnknown) {
				t.Errorf("%s: its code has no class", answer)
			}
		}
	}
	if len(codes) < 10 {
		t.Errorf("the transcripts contain only the codes %v", codes)
	}
}

func wantError(e *rpc.Error, status int) *Error {
	out := &Error{Code: e.Code, Message: e.Message, Status: status, RequestID: "ABC"}
	if e.Data != nil {
		out.Output = e.Data.PartialOutput
	}
	return out
}
