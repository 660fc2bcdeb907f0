package smtptest

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// raw is a client that says what it is told to.
type raw struct {
	t testing.TB
	net.Conn
	br *bufio.Reader
}

func dial(t testing.TB, s *Server) *raw {
	t.Helper()
	nc, err := s.Dial(t.Context(), "", "")
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	r := &raw{t: t, Conn: nc, br: bufio.NewReader(nc)}
	return r
}

// tls upgrades the connection.
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

// want reads replies, each of which must begin as told.
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

// closed wants the relay to have closed with nothing left to say.
func (r *raw) closed() {
	r.t.Helper()
	if b, err := io.ReadAll(r.br); len(b) > 0 || err != nil {
		r.t.Fatalf("got %q, %v; want EOF", b, err)
	}
	r.Close()
}

// reset wants the relay to have reset the connection.
func (r *raw) wasReset() {
	r.t.Helper()
	if _, err := r.br.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		r.t.Fatalf("got %v; want a reset", err)
	}
	r.Close()
}

// silent wants nothing to be said for a while; the relay has been seen to have done its work otherwise.
func (r *raw) silent() {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	defer r.SetReadDeadline(time.Time{})
	if b, err := r.br.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("got %q, %v; want silence", b, err)
	}
}

// ready brings the connection to where MAIL is possible.
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

func clientTLS(s *Server) *tls.Config { return &tls.Config{RootCAs: s.Roots(), ServerName: "localhost"} }

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

// plainRelay returns an unstarted relay without TLS and AUTH, for dialogues that are about something else.
func plainRelay() *Server {
	s := NewUnstartedServer()
	s.NoTLS, s.NoAuth = true, true
	return s
}

// start starts s and sees to it that it is closed and leaves no goroutine behind.
func start(t testing.TB, s *Server) *Server {
	t.Helper()
	before := goroutines()
	s.Start()
	t.Cleanup(func() {
		s.Close()
		noneLeft(t, before)
	})
	return s
}

func goroutines() int { return runtime.NumGoroutine() }

// noneLeft fails the test if there are more goroutines than before. The last of them may still be on their way out.
func noneLeft(t testing.TB, before int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for goroutines() > before {
		if ctx.Err() != nil {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, goroutines(), buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}
