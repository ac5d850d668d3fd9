package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// transferred is a guest whose client counts the transfers that it opens.
type transferred struct {
	*guest
	*portalclient.Client
	opened []io.ReadWriteCloser
}

// startTransferred starts a portal. attach opens its transfers; if it is nil, that is done as msbd does.
func startTransferred(t *testing.T, start func(t testing.TB, env ...string) *guest, attach sandbox.Attach) *transferred {
	t.Helper()
	g := &transferred{guest: start(t)}
	client, err := portalclient.New(t.Context(), g.stream(t, ""), func(ctx context.Context, id string) (io.ReadWriteCloser, error) {
		if attach != nil {
			return attach(ctx, id)
		}
		s := g.stream(t, id)
		g.opened = append(g.opened, s)
		return s, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	g.Client = client
	return g
}

// waitForBridges waits until the bridges of the transfers have ended.
func (g *transferred) waitForBridges() {
	for _, s := range g.opened {
		if b, ok := s.(*bridge); ok {
			<-b.ended
		}
	}
}

// largeFile creates a file of 9 MiB and returns its path and content.
func largeFile(t *testing.T) (string, []byte) {
	t.Helper()
	content := make([]byte, 9<<20)
	rand.Read(content)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func (g *transferred) open(t *testing.T, path string, offset, length int64) io.ReadCloser {
	t.Helper()
	_, file, err := g.ReadFile(t.Context(), sandbox.Path{Path: path}, offset, length)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// begin opens a large file and reads its first bytes, so that a transfer has begun.
func (g *transferred) begin(t *testing.T, path string) io.ReadCloser {
	t.Helper()
	file := g.open(t, path, 0, -1)
	if _, err := io.ReadFull(file, make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestTransfers reads parts of a large file. Those of 4 MiB or more come over a transfer, whose bridge ends.
func TestTransfers(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, content := largeFile(t)
		for _, tt := range []struct {
			offset, length int64
			want           []byte
			transfers      int
		}{
			{0, -1, content, 1},
			{1<<20 + 1, -1, content[1<<20+1:], 1},
			{12345, 4 << 20, content[12345:][:4<<20], 1},
			{0, 1 << 40, content, 1},
			{12345, 4<<20 - 1, content[12345:][:4<<20-1], 0},
			{6 << 20, -1, content[6<<20:], 0},
			{20 << 20, -1, nil, 0},
		} {
			g.opened = nil
			file := g.open(t, path, tt.offset, tt.length)
			got, err := io.ReadAll(file)
			if err != nil || !bytes.Equal(got, tt.want) {
				t.Errorf("%d bytes from %d on: read %d, %v, or other bytes", tt.length, tt.offset, len(got), err)
			}
			if err := file.Close(); err != nil {
				t.Error(err)
			}
			if len(g.opened) != tt.transfers {
				t.Errorf("%d bytes from %d on: %d transfers, want %d", tt.length, tt.offset, len(g.opened), tt.transfers)
			}
			g.waitForBridges()
		}
	})
}

// write writes content to the file at path, and says that it has length bytes.
func (g *transferred) write(t *testing.T, path string, content io.Reader, length int) error {
	_, _, err := g.WriteFile(t.Context(), sandbox.Path{Path: path}, sandbox.WriteOptions{Length: int64(length)}, content)
	return err
}

// TestUploads writes files. 4 MiB or more come over a transfer if their length is known.
func TestUploads(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, content := largeFile(t)
		for _, tt := range []struct{ length, known, transfers int }{
			{9 << 20, 9 << 20, 1}, {4 << 20, 4 << 20, 1}, {4<<20 - 1, 4<<20 - 1, 0}, {9 << 20, 0, 0}, {0, 0, 0},
		} {
			g.opened = nil
			err := g.write(t, path, bytes.NewReader(content[:tt.length]), tt.known)
			if got, readErr := os.ReadFile(path); err != nil || readErr != nil || !bytes.Equal(got, content[:tt.length]) {
				t.Errorf("%v: %v, %v, %d bytes, or other bytes", tt, err, readErr, len(got))
			}
			if len(g.opened) != tt.transfers {
				t.Errorf("%v: %d transfers", tt, len(g.opened))
			}
			g.waitForBridges()
		}
	})
}

// An upload that is not complete leaves the file as it was, and its transfer ends.
func TestUploadThatIsNotComplete(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, content := largeFile(t)
		kill := func() error {
			b, ok := g.opened[len(g.opened)-1].(*bridge)
			if !ok {
				return g.opened[len(g.opened)-1].Close()
			}
			if err := b.process.Kill(); err != nil {
				return err
			}
			_, err := io.Copy(io.Discard, b) // until the portal has noticed, because the pipes are also the portal's
			return err
		}
		broken := errors.New("the client is gone")
		for name, tt := range map[string]struct {
			rest io.Reader // after 5 MiB
			want error
		}{
			"it fails":      {readerFunc(func() error { return broken }), broken},
			"it is shorter": {bytes.NewReader(nil), io.ErrUnexpectedEOF},
			"its transfer is killed": {
				io.MultiReader(readerFunc(func() error { return cmp.Or(kill(), io.EOF) }), bytes.NewReader(content[5<<20:])), sandbox.ErrRunFailed,
			},
		} {
			before := len(g.opened)
			if err := g.write(t, path, io.MultiReader(bytes.NewReader(content[:5<<20]), tt.rest), len(content)); !errors.Is(err, tt.want) {
				t.Errorf("%s: %v, want %v", name, err, tt.want)
			}
			if len(g.opened) != before+1 {
				t.Errorf("%s: %d transfers", name, len(g.opened)-before)
			}
			g.waitForBridges()
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the file has %d bytes, or other bytes; %v", len(got), err)
		}
		// An error of the portal reaches the client.
		if err := g.write(t, filepath.Dir(path), bytes.NewReader(content), len(content)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "is a directory") {
			t.Errorf("write to a directory: %v", err)
		}
	})
}

// readerFunc is a reader that has no bytes, but the error of the function.
type readerFunc func() error

func (f readerFunc) Read([]byte) (int, error) { return 0, f() }

// A transfer that is given up ends, and does not disturb others.
func TestTransferIsGivenUp(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, content := largeFile(t)
		for range 6 { // more than there may be at a time
			g.begin(t, path).Close()
		}
		g.waitForBridges()
		file := g.open(t, path, 0, -1)
		defer file.Close()
		if got, err := io.ReadAll(file); err != nil || !bytes.Equal(got, content) || len(g.opened) != 7 {
			t.Errorf("the next: %d bytes, %v, or other bytes; %d transfers", len(got), err, len(g.opened))
		}
	})
}

// If no transfer can be opened, or it opens too late, the bytes come in messages.
func TestTransferThatDoesNotBegin(t *testing.T) {
	t.Parallel()
	for name, attach := range map[string]func(t *testing.T, g *guest, id string) (io.ReadWriteCloser, error){
		"fails": func(*testing.T, *guest, string) (io.ReadWriteCloser, error) {
			return nil, errors.New("cannot be opened")
		},
		"is late": func(t *testing.T, g *guest, id string) (io.ReadWriteCloser, error) {
			time.Sleep(3500 * time.Millisecond) // longer than the portal waits
			return startBridge(t, "transfer", id, g.socket), nil
		},
		"is another": func(t *testing.T, g *guest, id string) (io.ReadWriteCloser, error) {
			return startBridge(t, "transfer", strings.Repeat("0", len(id)), g.socket), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var g *transferred
			g = startTransferred(t, startGuest, func(_ context.Context, id string) (io.ReadWriteCloser, error) { return attach(t, g.guest, id) })
			path, content := largeFile(t)
			file := g.open(t, path, 0, -1)
			defer file.Close()
			if got, err := io.ReadAll(file); err != nil || !bytes.Equal(got, content) {
				t.Errorf("read %d bytes, %v, or other bytes", len(got), err)
			}
			err := g.write(t, path, bytes.NewReader(content[1:]), len(content)-1)
			if got, readErr := os.ReadFile(path); err != nil || readErr != nil || !bytes.Equal(got, content[1:]) {
				t.Errorf("wrote %d bytes, %v, %v, or other bytes", len(got), err, readErr)
			}
		})
	}
}

// A transfer whose process in the sandbox is killed is an error.
func TestTransferThatIsKilled(t *testing.T) {
	t.Parallel()
	g := startTransferred(t, startGuest, nil)
	path, _ := largeFile(t)
	file := g.begin(t, path)
	defer file.Close()
	if err := g.opened[0].(*bridge).process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, file); !errors.Is(err, sandbox.ErrRunFailed) || !strings.Contains(err.Error(), "was ended in the sandbox") {
		t.Errorf("read the rest: %v", err)
	}
}

// A file that becomes shorter while it is sent is an error, not a short file.
func TestTransferOfAFileThatChanges(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, _ := largeFile(t)
		file := g.begin(t, path)
		defer file.Close()
		if err := os.Truncate(path, 1<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, file); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "changed while it was read") {
			t.Errorf("read the rest: %v", err)
		}
	})
}

// The connection of another msbd ends the transfers of the one before, which may have been killed.
func TestTransferEndsWithItsConnection(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := startTransferred(t, start, nil)
		path, _ := largeFile(t)
		file := g.begin(t, path)
		defer file.Close()
		g.connect(t)
		g.waitForBridges()
		if _, err := io.Copy(io.Discard, file); !errors.Is(err, sandbox.ErrRunFailed) {
			t.Errorf("read the rest: %v, want sandbox.ErrRunFailed", err)
		}
	})
}
