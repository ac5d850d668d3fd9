package store_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// The test binary is also the server that is killed, traced or given a bad disk.
const (
	childRole = "MSB_TEST_ROLE"
	childDir  = "MSB_TEST_DIR"
)

var roles = map[string]func(dir string) error{
	"churn":   churn,
	"history": history,
	"fixture": writeFixture,
}

func TestMain(m *testing.M) {
	store.MaybeCheckChild()
	if role, ok := roles[os.Getenv(childRole)]; ok {
		if err := role(os.Getenv(childDir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is this program in another role.
func child(role, dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childRole+"="+role, childDir+"="+dir)
	return cmd
}

// soak says to test for long.
var soak = os.Getenv("MSB_SOAK") != ""

// one of how many cases is tried. The race detector makes each of them many times as dear, and has nothing to
// find where one goroutine opens a state by itself, or a child is traced or killed: there it is one of 20.
func oneOf() int {
	if racing && !soak {
		return 20
	}
	return 1
}

var quiet = slog.New(slog.DiscardHandler)

// server is the key side of a server: everything that is behind its sockets.
type server struct {
	*store.Store
	issuer   *keys.Issuer
	verifier *keys.Verifier
	backups  *backup.Service
}

// start opens a server as the daemon does.
func start(dir string) (*server, error) {
	s, err := store.Open(dir)
	if err != nil {
		return nil, err
	}
	open := func() (*keys.Issuer, *keys.Verifier, error) {
		return keys.Open(keys.Options{KeyringPath: filepath.Join(dir, "keyring.json"), Store: s, Log: quiet})
	}
	err = backup.Complete(context.Background(), dir, func() (backup.Keys, error) {
		issuer, _, err := open()
		return issuer, err
	}, quiet)
	var srv *server
	if err == nil {
		srv = &server{Store: s}
		srv.issuer, srv.verifier, err = open()
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	srv.backups = backup.New(backup.Options{Dir: dir, Keys: srv.issuer, Store: s, ReadKeys: store.ReadKeys, Log: quiet})
	return srv, nil
}

func mustStart(t testing.TB, dir string) *server {
	t.Helper()
	srv, err := start(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = srv.Close() })
	return srv
}
