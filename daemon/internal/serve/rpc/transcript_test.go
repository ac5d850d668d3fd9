package rpc_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

var update = flag.Bool("update", false, "rewrite the responses in testdata")

// TestTranscripts replays testdata/*.txt. Each file has a gateway of its own. A line "> " is the body of a request, and
// "< " is the exact status and body of the response to it. A line "@ PATH" sends the following requests to PATH.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			s := New(t)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			path := rpc.Path
			for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
				line := lines.Text()
				body, isRequest := strings.CutPrefix(line, "> ")
				at, isPath := strings.CutPrefix(line, "@ ")
				switch {
				case isPath:
					path = at
					fmt.Fprintln(&got, line)
				case isRequest:
					w := s.Post(body, func(r *http.Request) { r.URL.Path = path })
					fmt.Fprintln(&got, line)
					fmt.Fprintf(&got, "< %s\n", strings.ReplaceAll(
						strings.TrimSpace(fmt.Sprint(w.Code, " ", w.Body)), w.Header().Get("X-Request-Id"), "REQUEST-ID"))
				case !strings.HasPrefix(line, "< "):
					fmt.Fprintln(&got, line)
				}
			}
			if *update {
				if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want := strings.Split(string(text), "\n")
			for i, line := range strings.Split(got.String(), "\n") {
				if i >= len(want) || line != want[i] {
					t.Fatalf("%s:%d: got\n%s", file, i+1, line)
				}
			}
		})
	}
}
