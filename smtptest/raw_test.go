package smtptest

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// raw is a client that sends exactly what a test tells it to.
type raw struct {
	t testing.TB
	net.Conn
	pipe *netpipe.Conn // below TLS; nil over TCP
	br   *bufio.Reader
}

func dial(t testing.TB, s *Server) *raw {
	t.Helper()
	nc, err := s.Dial(t.Context(), "", "")
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	r := &raw{t: t, Conn: nc, br: bufio.NewReader(nc)}
	r.pipe, _ = nc.(*netpipe.Conn)
	t.Cleanup(func() { nc.Close() }) // before the relay is closed
	return r
}

// tls runs the client's TLS handshake.
func (r *raw) tls(cfg *tls.Config) {
	r.t.Helper()
	tc := tls.Client(r.Conn, cfg)
	if err := tc.Handshake(); err != nil {
		r.t.Fatalf("TLS handshake: %v", err)
	}
	r.Conn, r.br = tc, bufio.NewReader(tc)
}

// say writes the lines in one write.
func (r *raw) say(lines ...string) {
	r.t.Helper()
	if _, err := io.WriteString(r.Conn, strings.Join(lines, "\r\n")+"\r\n"); err != nil {
		r.t.Fatalf("writing %q: %v", lines[0], err)
	}
}

// reply reads a reply; its lines are joined by "\n".
func (r *raw) reply() (string, error) {
	var lines []string
	for {
		line, err := r.br.ReadString('\n')
		if err != nil {
			return strings.Join(lines, "\n"), err
		}
		line = strings.TrimSuffix(line, "\r\n")
		lines = append(lines, line)
		if len(line) < 4 || line[3] != '-' {
			return strings.Join(lines, "\n"), nil
		}
	}
}

// want reads replies and checks the beginning of each.
func (r *raw) want(prefixes ...string) {
	r.t.Helper()
	for i, prefix := range prefixes {
		got, err := r.reply()
		if err != nil {
			r.t.Fatalf("reply %d: %q, %v; want %q", i+1, got, err, prefix)
		}
		if !strings.HasPrefix(got, prefix) {
			r.t.Fatalf("reply %d: %q; want %q", i+1, got, prefix)
		}
	}
}

// closed checks that the relay has closed, with nothing left to read.
func (r *raw) closed() {
	r.t.Helper()
	if b, err := io.ReadAll(r.br); len(b) > 0 || err != nil {
		r.t.Fatalf("got %q, %v; want EOF", b, err)
	}
	r.Close()
}

// wasReset checks that the relay has reset the connection.
func (r *raw) wasReset() {
	r.t.Helper()
	if _, err := r.br.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		r.t.Fatalf("got %v; want a reset", err)
	}
	r.Close()
}

// silent checks that the relay sends nothing more until time passes or the client sends. For bubbles only.
func (r *raw) silent() {
	r.t.Helper()
	synctest.Wait()
	if n := r.br.Buffered() + r.pipe.Unread(); n > 0 {
		b, _ := r.br.Peek(r.br.Buffered())
		r.t.Fatalf("got %d octets, %q; want silence", n, b)
	}
}

// ready logs in if necessary, so that MAIL is possible.
func (r *raw) ready(s *Server) {
	r.t.Helper()
	if s.implicitTLS {
		r.tls(clientTLS(s))
	}
	r.want("220 SG ESMTP")
	r.say("EHLO client.test")
	r.want("250-")
	if s.tlsConfig != nil && !s.implicitTLS {
		r.say("STARTTLS")
		r.want("220 ")
		r.tls(clientTLS(s))
		r.say("EHLO client.test")
		r.want("250-")
	}
	if !s.NoAuth {
		r.say("AUTH PLAIN " + plain(s))
		r.want("235 ")
	}
}

func clientTLS(s *Server) *tls.Config {
	return &tls.Config{RootCAs: s.Roots(), ServerName: "localhost"}
}

func plain(s *Server) string {
	return base64.StdEncoding.EncodeToString([]byte("\x00" + s.Username + "\x00" + s.Password))
}

// open returns a ready connection.
func open(t testing.TB, s *Server) *raw {
	t.Helper()
	r := dial(t, s)
	r.ready(s)
	return r
}

// send sends a message step by step, and returns the final reply.
func (r *raw) send(from, to, body string) {
	r.t.Helper()
	r.say("MAIL FROM:<"+from+">", "RCPT TO:<"+to+">", "DATA")
	r.want("250 ", "250 ", "354 ")
	r.say(body, ".")
	r.want("250 Ok: queued as ")
}

// plainRelay returns an unstarted relay without TLS and AUTH, for tests of other things.
func plainRelay() *Server {
	s := NewUnstartedServer()
	s.NoTLS, s.NoAuth = true, true
	return s
}

// start starts s, closes it at the end of the test, and checks that no goroutine is left.
func start(t testing.TB, s *Server) *Server {
	t.Helper()
	before := runtime.NumGoroutine()
	s.Start()
	t.Cleanup(func() {
		s.Close()
		noneLeft(t, before)
	})
	return s
}

// bubble runs f in a synctest bubble with s started in memory. The bubble ends only when every goroutine has.
func bubble(t *testing.T, s *Server, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s.InMemory = true
		s.Start()
		t.Cleanup(s.Close)
		f(t)
	})
}

// noneLeft fails the test if there are more goroutines than before, after waiting for those about to end.
func noneLeft(t testing.TB, before int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for runtime.NumGoroutine() > before {
		if ctx.Err() != nil {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}
