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

// Tests run this test binary again as a server that they kill, trace or give a faulty disk. These environment variables
// select the function that it runs and its directory.
const (
	childRole = "MSB_TEST_ROLE"
	childDir  = "MSB_TEST_DIR"
	childSeed = "MSB_TEST_SEED" // for the role churn: the seed of its random choices
)

// roles are the roles of a child process. The files that the race detector leaves out add theirs.
var roles = map[string]func(dir string) error{
	"history": history,
	"fixture": writeFixture,
}

func TestMain(m *testing.M) {
	store.RunCheckIfChild()
	if role, ok := roles[os.Getenv(childRole)]; ok {
		if err := role(os.Getenv(childDir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child returns a command that runs this test binary in a role.
func child(role, dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childRole+"="+role, childDir+"="+dir)
	return cmd
}

// soak is set to run the tests with many more cases.
var soak = os.Getenv("MSB_SOAK") != ""

var quiet = slog.New(slog.DiscardHandler)

// server is a server's state and API keys, without its listeners and sandboxes.
type server struct {
	*store.Store
	issuer   *keys.Issuer
	verifier *keys.Verifier
	backups  *backup.Service
}

// start opens the state directory in the same order as the daemon does.
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
