//go:build unix

// Tests what the example promises: a promised mail is sent, once, even if the service is killed.
package main

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("EXAMPLE_DIR"); dir != "" { // the test binary runs as the service
		if err := run(dir, "shop@example.com", os.Getenv("EXAMPLE_LISTEN"), os.Getenv("SMTP_URL")); err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// service is the example in a separate process.
func service(t *testing.T, dir, listen, relay string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "EXAMPLE_DIR="+dir, "EXAMPLE_LISTEN="+listen, "SMTP_URL=smtp://"+relay+"?tls=none")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// order places an order, and asks again until there is an answer.
func order(t *testing.T, listen, id string) {
	t.Helper()
	for t.Context().Err() == nil {
		r, err := http.PostForm("http://"+listen+"/orders", url.Values{"id": {id}, "email": {"ann@example.org"}})
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		r.Body.Close()
		if r.StatusCode != http.StatusAccepted {
			t.Fatalf("order %s: %s", id, r.Status)
		}
		return
	}
}

func TestPromisedMailIsSentOnceAlthoughTheServiceIsKilled(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) { s.NoTLS, s.NoAuth = true, true })
	away := relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 not now", Drop: true, Count: -1})
	dir, listen := t.TempDir(), freeAddr(t)
	first := service(t, dir, listen, relay.Addr())
	order(t, listen, "1234")
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()

	away.Remove()
	second := service(t, dir, listen, relay.Addr())
	order(t, listen, "1234") // the customer has not seen the answer
	for state := ""; state != "accepted"; time.Sleep(20 * time.Millisecond) {
		r, err := http.Get("http://" + listen + "/orders/1234")
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(r.Body)
		r.Body.Close()
		state = strings.TrimSpace(string(text))
	}
	if err := second.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := second.Wait(); err != nil {
		t.Errorf("the service did not shut down cleanly: %v", err)
	}
	if n := len(relay.Messages()); n != 1 {
		t.Errorf("the relay has the mail %d times", n)
	}
}

// freeAddr is an unused address.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
