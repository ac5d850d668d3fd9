package tlscert

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Run notices every way of replacing the files. Open connections are not affected.
func TestReplacedFilesAreServed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "server CA")
	for name, setup := range map[string]func(t *testing.T, f *files, first issued) (replace func(issued)){
		"in place": func(t *testing.T, f *files, _ issued) func(issued) {
			return func(next issued) {
				f.write(t, f.CertFile, next.cert)
				f.write(t, f.KeyFile, next.key)
			}
		},
		"renamed": func(t *testing.T, f *files, _ issued) func(issued) {
			return func(next issued) {
				for path, data := range map[string][]byte{f.CertFile: next.cert, f.KeyFile: next.key} {
					f.write(t, path+".new", data)
					if err := os.Rename(path+".new", path); err != nil {
						t.Fatal(err)
					}
				}
			}
		},
		// Kubernetes does this: the files are symbolic links through ..data, which is a link to a directory.
		"symbolic links": func(t *testing.T, f *files, first issued) func(issued) {
			dir := t.TempDir()
			data := filepath.Join(dir, "..data")
			write := func(name string, pair issued) {
				if err := errors.Join(
					os.Mkdir(filepath.Join(dir, name), 0o700),
					os.WriteFile(filepath.Join(dir, name, "cert.pem"), pair.cert, 0o600),
					os.WriteFile(filepath.Join(dir, name, "key.pem"), pair.key, 0o600),
					os.Symlink(name, data+".new"),
					os.Rename(data+".new", data),
				); err != nil {
					t.Fatal(err)
				}
			}
			write("..first", first)
			f.CertFile, f.KeyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
			if err := errors.Join(
				os.Symlink("..data/cert.pem", f.CertFile),
				os.Symlink("..data/key.pem", f.KeyFile),
			); err != nil {
				t.Fatal(err)
			}
			return func(next issued) { write("..second", next) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second := ca.issue(t, nil), ca.issue(t, nil)
			f := newFiles(t, first)
			replace := setup(t, &f, first)
			s := open(t, f.Options)
			run(t, s)
			address := serve(t, s)
			client := &tls.Config{RootCAs: ca.pool()}

			openConn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: ca.pool(), NextProtos: []string{"http/1.1"}})
			if err != nil {
				t.Fatal(err)
			}
			defer openConn.Close()
			responses := bufio.NewReader(openConn)
			request := func() {
				t.Helper()
				io.WriteString(openConn, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
				resp, err := http.ReadResponse(responses, nil)
				if err != nil {
					t.Fatalf("request on the open connection: %v", err)
				}
				io.Copy(io.Discard, resp.Body)
			}
			request()
			if got := servedSerial(t, address, client); got != first.serial(t) {
				t.Fatalf("got certificate %s, want the first, %s", got, first.serial(t))
			}
			replace(second)
			eventually(t, "the second certificate to be served", func() bool {
				return servedSerial(t, address, client) == second.serial(t)
			})
			request()
		})
	}
}

func TestUnusableFilesAreNotUsed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	first, second := ca.issue(t, nil), ca.issue(t, nil)
	chain := append(bytes.Clone(second.cert), ca.pem()...)
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, f files)
		want   []string // substrings of the warning; %C, %K and %A stand for the certificate, key and client CA files
	}{
		{"certificate of another key", func(t *testing.T, f files) { f.write(t, f.CertFile, second.cert) },
			[]string{"%C", "%K", "does not match", "the certificate's own key"}},
		{"key of another certificate", func(t *testing.T, f files) { f.write(t, f.KeyFile, second.key) },
			[]string{"%C", "%K", "does not match"}},
		{"chain cut off", func(t *testing.T, f files) {
			f.write(t, f.CertFile, chain[:len(chain)-40])
			f.write(t, f.KeyFile, second.key)
		}, []string{"%C", "cut off"}},
		{"chain with a damaged issuer", func(t *testing.T, f files) {
			f.write(t, f.CertFile, append(bytes.Clone(second.cert), encode("CERTIFICATE", []byte("garbage"))...))
			f.write(t, f.KeyFile, second.key)
		}, []string{"%C", "certificate 2 in it is damaged"}},
		{"empty certificate", func(t *testing.T, f files) { f.write(t, f.CertFile, nil) },
			[]string{"%C", "contains no certificate"}},
		{"empty key", func(t *testing.T, f files) { f.write(t, f.KeyFile, nil) },
			[]string{"%K", "failed to find any PEM data"}},
		{"encrypted key", func(t *testing.T, f files) { f.write(t, f.KeyFile, encode("ENCRYPTED PRIVATE KEY", []byte("x"))) },
			[]string{"%K", "encrypted", "openssl pkey"}},
		{"no certificate", func(t *testing.T, f files) { os.Remove(f.CertFile) },
			[]string{"%C", "no such file", "can read"}},
		{"key is a directory", func(t *testing.T, f files) {
			if err := errors.Join(os.Remove(f.KeyFile), os.Mkdir(f.KeyFile, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, []string{"TLS key %K", "not a regular file"}},
		{"key is a FIFO", func(t *testing.T, f files) {
			if err := errors.Join(os.Remove(f.KeyFile), unix.Mkfifo(f.KeyFile, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, []string{"TLS key %K", "not a regular file"}},
		{"huge certificate", func(t *testing.T, f files) { f.write(t, f.CertFile, make([]byte, maxFile+1)) },
			[]string{"%C", "longer than"}},
		{"client CA file without certificates", func(t *testing.T, f files) { f.write(t, f.ClientCAFile, []byte("nothing")) },
			[]string{"client CA file %A", "contains no certificate"}},
		{"second client CA is cut off", func(t *testing.T, f files) {
			f.write(t, f.ClientCAFile, append(ca.pem(), ca.pem()[:100]...))
		}, []string{"client CA file %A", "cut off"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFiles(t, first)
			f.withClientCA(t, ca)
			var log bytes.Buffer
			f.Log = slog.New(slog.NewTextHandler(&log, nil))
			s := open(t, f.Options)
			address := serve(t, s)
			client := &tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{first.pair(t)}}
			paths := strings.NewReplacer("%C", f.CertFile, "%K", f.KeyFile, "%A", f.ClientCAFile)
			check := func(text string) {
				t.Helper()
				for _, want := range tc.want {
					if want := paths.Replace(want); !strings.Contains(text, want) {
						t.Errorf("got %q, want %q in it", text, want)
					}
				}
			}

			tc.change(t, f)
			poll(s)
			poll(s)
			if got := servedSerial(t, address, client); got != first.serial(t) {
				t.Errorf("got certificate %s, want the first, %s", got, first.serial(t))
			}
			warnings := s.Status(time.Now()).Warnings
			if len(warnings) != 1 || !strings.Contains(warnings[0], "cannot be used") {
				t.Fatalf("got warnings %q, want one that the changed files cannot be used", warnings)
			}
			check(warnings[0])
			if n := strings.Count(log.String(), "cannot be used"); n != 1 {
				t.Errorf("the warning was logged %d times, want once:\n%s", n, &log)
			}

			// Open fails with the same files.
			_, err := Open(f.Options)
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("Open: got %v, want a failed precondition", err)
			}
			check(err.Error())

			// When the files are valid again, they are used.
			os.Remove(f.KeyFile)
			f.write(t, f.CertFile, chain)
			f.write(t, f.KeyFile, second.key)
			f.withClientCA(t, ca)
			poll(s)
			if got := servedSerial(t, address, client); got != second.serial(t) {
				t.Errorf("got certificate %s, want the second, %s", got, second.serial(t))
			}
			if warnings := s.Status(time.Now()).Warnings; len(warnings) > 0 {
				t.Errorf("got warnings %q, want none", warnings)
			}
		})
	}
}

// While a chain is being written, the file may be valid at each moment but incomplete.
func TestHalfWrittenChainIsNotServed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	pair := ca.issue(t, nil)
	f := newFiles(t, pair)
	s := open(t, f.Options)
	chainLength := func() int { return len(s.live.Load().config.Certificates[0].Certificate) }

	for length := 2; length < 6; length++ {
		f.write(t, f.CertFile, append(bytes.Clone(pair.cert), bytes.Repeat(ca.pem(), length-1)...))
		s.poll(time.Now())
		if chainLength() != 1 {
			t.Fatalf("a chain of %d certificates was used after only one poll", length)
		}
	}
	s.poll(time.Now())
	if chainLength() != 5 {
		t.Errorf("got a chain of %d certificates, want 5", chainLength())
	}
}

func TestHandshakesReadNoFiles(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	pair := ca.issue(t, nil)
	f := newFiles(t, pair)
	f.withClientCA(t, ca)
	s := open(t, f.Options)
	for _, path := range []string{f.CertFile, f.KeyFile, f.ClientCAFile} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	servedSerial(t, serve(t, s), &tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{pair.pair(t)}})
}

func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	pairs := make([]issued, 20)
	known := map[string]bool{}
	for i := range pairs {
		pairs[i] = ca.issue(t, nil)
		known[pairs[i].serial(t)] = true
	}
	f := newFiles(t, pairs[0])
	f.withClientCA(t, ca)
	s := open(t, f.Options)
	address := serve(t, s)
	client := &tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{pairs[0].pair(t)}}

	const clients = 4
	handshakes := make(chan error)
	var load sync.WaitGroup
	stop := make(chan struct{})
	defer func() { close(stop); load.Wait() }()
	for range clients {
		load.Go(func() {
			for {
				state, _, err := get(address, client)
				if err == nil && !known[state.PeerCertificates[0].SerialNumber.String()] {
					err = errors.New("the server used a certificate that was never in the file")
				}
				select {
				case handshakes <- err:
				case <-stop:
					return
				}
			}
		})
	}
	for _, pair := range pairs {
		// In between, the certificate is first cut off and then does not match the key.
		for _, step := range []func(){
			func() { f.write(t, f.CertFile, pair.cert[:len(pair.cert)/2]) },
			func() { f.write(t, f.CertFile, pair.cert) },
			func() { f.write(t, f.KeyFile, pair.key) },
		} {
			step()
			poll(s)
			for range clients + 1 { // so that at least one handshake began after the step
				if err := <-handshakes; err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if got, last := servedSerial(t, address, client), pairs[len(pairs)-1].serial(t); got != last {
		t.Errorf("got certificate %s, want the last, %s", got, last)
	}
}

func TestRunReturnsWhenContextEnds(t *testing.T) {
	t.Parallel()
	s := open(t, newFiles(t, newAuthority(t, "CA").issue(t, nil)).Options)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}
