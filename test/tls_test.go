// STARTTLS and TLS, wrong settings, and what is believed from a relay before TLS.
package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// recorder records what a client writes to its connections, below TLS.
type recorder struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)

	mu  sync.Mutex // guards the field below
	raw bytes.Buffer
}

func (r *recorder) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := r.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &recordedConn{conn, r}, nil
}

type recordedConn struct {
	net.Conn
	r *recorder
}

func (c *recordedConn) Write(p []byte) (int, error) {
	c.r.mu.Lock()
	c.r.raw.Write(p)
	c.r.mu.Unlock()
	return c.Conn.Write(p)
}

func (r *recorder) written() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.raw.String()
}

// What a user sees after a mistake in the address, the port, the TLS mode, the certificate or the key: one error, which names the
// remedy, and no secret sent to the wrong receiver.
func TestWrongSettingsSendNothingSecretAndNameTheCure(t *testing.T) {
	const password = "the-real-key-0123456789"
	otherName := func(s *smtptest.Server) { s.CertNames = []string{"mail.example.net"} }
	expired := func(s *smtptest.Server) { s.CertNotAfter = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC) }
	noTLS := func(s *smtptest.Server) { s.NoTLS = true }

	for _, test := range []struct {
		name     string
		relay    func(*smtptest.Server)
		implicit bool // the relay uses TLS from the first byte
		client   func(*smtprelay.Config)
		op       smtprelay.Op
		says     []string
		isTLS    bool // a TLS connection may have been established, and carried credentials
	}{
		{
			name:  "certificate for another name",
			relay: otherName,
			op:    smtprelay.OpTLS,
			says:  []string{"relay.example.com", "mail.example.net"},
		},
		{
			name:     "certificate for another name, implicit TLS",
			relay:    otherName,
			implicit: true,
			client:   func(c *smtprelay.Config) { c.Addr = "relay.example.com:465" },
			op:       smtprelay.OpTLS,
			says:     []string{"relay.example.com", "mail.example.net"},
		},
		{
			name:  "expired certificate",
			relay: expired,
			op:    smtprelay.OpTLS,
			says:  []string{"expired", "2020-01-01"},
		},
		{
			name:   "certificate of an unknown authority",
			client: func(c *smtprelay.Config) { c.TLSConfig.RootCAs = x509.NewCertPool() },
			op:     smtprelay.OpTLS,
			says:   []string{"unknown authority", "RootCAs"},
		},
		{
			name: "a relay that supports only old TLS",
			relay: func(s *smtptest.Server) {
				s.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
			},
			op:   smtprelay.OpTLS,
			says: []string{"TLS in common", "MinVersion", "1.2"},
		},
		{
			name:   "a client that accepts only new TLS",
			relay:  func(s *smtptest.Server) { s.TLS = &tls.Config{MaxVersion: tls.VersionTLS12} },
			client: func(c *smtprelay.Config) { c.TLSConfig.MinVersion = tls.VersionTLS13 },
			op:     smtprelay.OpTLS,
			says:   []string{"TLS in common", "MinVersion"},
		},
		{
			name:  "STARTTLS stripped",
			relay: noTLS,
			op:    smtprelay.OpSTARTTLS,
			says:  []string{"does not offer STARTTLS", "465", "TLSNone"},
		},
		{
			name:     "plain text on a TLS port",
			implicit: true,
			client: func(c *smtprelay.Config) {
				c.Timeouts.Greeting = 100 * time.Millisecond // the relay waits for a ClientHello and sends nothing
			},
			op:   smtprelay.OpGreeting,
			says: []string{"greeting: no greeting within 100ms; ", "TLSImplicit", "smtps://"},
		},
		{
			name:   "wrong password",
			client: func(c *smtprelay.Config) { c.Password = "the-wrong-key-9876543210" },
			op:     smtprelay.OpAuth,
			says:   []string{"535", "Password"},
			isTLS:  true,
		},
		{
			name:   "a closed port",
			client: func(c *smtprelay.Config) { c.Addr = closedPort(t); c.Dial = nil },
			op:     smtprelay.OpDial,
			says:   []string{"127.0.0.1:", "refused"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			relay := smtptest.NewUnstartedServer()
			relay.Password = password
			relay.CertNames = []string{"relay.example.com"}
			if test.relay != nil {
				test.relay(relay)
			}
			if test.implicit {
				relay.StartTLS()
			} else {
				relay.Start()
			}
			defer relay.Close()

			wire := &recorder{dial: relay.Dial}
			cfg := smtprelay.Config{
				Addr:      "relay.example.com:587",
				Username:  configOf(relay).Username,
				Password:  password,
				TLSConfig: &tls.Config{RootCAs: relay.Roots()},
				Retry:     smtprelay.Retry{MaxAttempts: 1},
				Dial:      wire.Dial,
			}
			if test.client != nil {
				test.client(&cfg)
			}
			client := newClient(t, cfg)
			m := numbered(0)
			_, err := client.Send(t.Context(), m)
			e, ok := errors.AsType[*smtprelay.Error](err)
			if !ok {
				t.Fatalf("got %T %v, want an *Error", err, err)
			}
			t.Logf("%v", err)
			if e.Op != test.op || e.Outcome != smtprelay.NotAccepted {
				t.Errorf("op %q, outcome %v; want %q, not accepted", e.Op, e.Outcome, test.op)
			}
			for _, words := range test.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%q does not contain %q", err, words)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q is more than one line", err)
			}
			if err := client.Ping(t.Context()); err == nil {
				t.Error("Ping finds nothing wrong")
			}
			client.Close()
			relay.Close()

			want(t, "messages at the relay", relay.Stats().Accepted, 0)
			if !test.isTLS {
				want(t, "AUTHs at the relay", relay.Stats().Auths, 0)
			}
			raw := wire.written()
			for _, secret := range []string{
				password, base64.StdEncoding.EncodeToString([]byte(password)),
				base64.StdEncoding.EncodeToString([]byte("\x00" + cfg.Username + "\x00" + password)),
				"AUTH", "MAIL", "RCPT", m.From, m.To[0],
			} {
				if strings.Contains(raw, secret) {
					t.Errorf("%q was sent in plaintext: %q", secret, raw)
				}
			}
		})
	}
}

// Most relays greet at once, so a client which uses TLS on a port for STARTTLS reads a 220 instead of a ServerHello.
func TestTLSOnAPlainPortNamesTheRemedy(t *testing.T) {
	var mu sync.Mutex // guards the next
	var heard []string
	relay := &relaytest.Relay{Answer: func(_ int, line string) string {
		mu.Lock()
		defer mu.Unlock()
		heard = append(heard, line)
		return relaytest.Agree("250 AUTH PLAIN", line)
	}}
	l, err := relay.Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client := newClient(t, smtprelay.Config{
		Addr:     l.Addr().String(),
		TLS:      smtprelay.TLSImplicit,
		Username: "ann",
		Password: "the-real-key-0123456789",
		Retry:    smtprelay.Retry{MaxAttempts: 1},
	})
	_, err = client.Send(t.Context(), numbered(0))
	t.Log(err)
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok || e.Op != smtprelay.OpTLS || e.Outcome != smtprelay.NotAccepted || !e.Temporary() {
		t.Errorf("got %v; want a failed TLS handshake, which an attacker on the path may have caused", err)
	}
	if !strings.Contains(err.Error(), "use TLSStartTLS") {
		t.Errorf("%q does not name the remedy", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if said := strings.Join(heard, "\n"); strings.Contains(said, "AUTH") || strings.Contains(said, "MAIL") {
		t.Errorf("the relay received %q in plaintext", said)
	}
}

// closedPort returns a closed port of this machine.
func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestPlaintextReplyIsNeverPermanentIfTLSIsRequired(t *testing.T) {
	const ready, offer = "220 relay", "250-relay\n250 STARTTLS"
	for _, tt := range []struct {
		why    string
		tls    smtprelay.TLSMode
		script []string // the greeting, and the reply to each command
	}{
		{"greeting", smtprelay.TLSStartTLS, []string{"554 go away"}},
		{"EHLO", smtprelay.TLSStartTLS, []string{ready, "554 go away"}},
		{"EHLO not known", smtprelay.TLSStartTLS, []string{ready, "502 what?"}},
		{"EHLO refused temporarily", smtprelay.TLSStartTLS, []string{ready, "451 later"}},
		{"no STARTTLS offered", smtprelay.TLSStartTLS, []string{ready, "250 relay"}},
		{"STARTTLS refused", smtprelay.TLSStartTLS, []string{ready, offer, "554 no"}},
		{"an alert in place of TLS", smtprelay.TLSStartTLS, []string{ready, offer, "220 go\n\x15\x03\x03\x00\x02\x02\x28"}},
		{"an alert", smtprelay.TLSImplicit, []string{"\x15\x03\x03\x00\x02\x02\x28"}},
		{"protocol version", smtprelay.TLSImplicit, []string{"\x15\x03\x03\x00\x02\x02\x46"}},
		{"a refusal in place of TLS", smtprelay.TLSImplicit, []string{"554 go away"}},
		{"a greeting in place of TLS", smtprelay.TLSImplicit, []string{ready}},
		{"no reply at all", smtprelay.TLSStartTLS, []string{"HTTP/1.1 400 Bad Request"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var said atomic.Int64
				client := newClient(t, smtprelay.Config{
					Addr: "relay.example:587", TLS: tt.tls, Retry: smtprelay.Retry{MaxAttempts: 2},
					Dial: relaytest.Dial(0, func(n int, line string) string {
						if line == "" {
							said.Store(0)
						}
						i := int(said.Add(1)) - 1
						if i >= len(tt.script) {
							return ""
						}
						return tt.script[i]
					}),
				})
				_, err := client.Send(t.Context(), numbered(0))
				if !smtprelay.ShouldRetry(err) {
					t.Errorf("got %v, want an error for which a queue keeps the message", err)
				}
			})
		})
	}
}

// heardConn records what is read from a connection, below TLS.
type heardConn struct {
	net.Conn
	heard []byte
}

func (c *heardConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.heard = append(c.heard, p[:n]...)
	return n, err
}

// endsInAlert reports whether the last TLS 1.2 record that was read is an alert. crypto/tls returns io.EOF in any case.
func (c *heardConn) endsInAlert() bool {
	const header, alert = 5, 21
	kind := byte(0)
	for rest := c.heard; len(rest) >= header; {
		kind = rest[0]
		rest = rest[min(len(rest), header+int(binary.BigEndian.Uint16(rest[3:]))):]
	}
	return kind == alert
}

// tlsRelay listens with TLS from the first byte and replies like relaytest.Agree. At the end of a session it sends to ended
// whether the client has ended TLS.
func tlsRelay(t *testing.T, extensions string) (cfg smtprelay.Config, ended chan bool) {
	t.Helper()
	web := httptest.NewUnstartedServer(nil) // for its certificate
	web.StartTLS()
	web.Close()
	roots := x509.NewCertPool()
	roots.AddCert(web.Certificate())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	ended = make(chan bool, 1)
	serve := func(raw *heardConn) {
		conn := tls.Server(raw, &tls.Config{Certificates: web.TLS.Certificates, MaxVersion: tls.VersionTLS12})
		defer conn.Close()
		in, inBody := bufio.NewReader(conn), false
		for answer := relaytest.Agree(extensions, ""); ; {
			if answer != "" {
				io.WriteString(conn, strings.ReplaceAll(answer, "\n", "\r\n")+"\r\n")
			}
			line, err := in.ReadString('\n')
			if err != nil {
				ended <- raw.endsInAlert()
				return
			}
			switch line = strings.TrimSuffix(line, "\r\n"); {
			case inBody && line != ".":
				answer = ""
			default:
				answer = relaytest.Agree(extensions, line)
				inBody = line == "DATA"
			}
		}
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(&heardConn{Conn: conn})
		}
	}()
	return smtprelay.Config{Addr: l.Addr().String(), TLS: smtprelay.TLSImplicit, TLSConfig: &tls.Config{RootCAs: roots}, Retry: smtprelay.Retry{MaxAttempts: 1}}, ended
}

// failingBody fails after a part.
type failingBody struct{}

func (failingBody) WriteTo(w io.Writer) (int64, error) {
	n, _ := w.Write(bytes.Repeat([]byte("half of it\r\n"), 10_000))
	return int64(n), errors.New("no more")
}

func TestTLSIsClosedOnlyIfTheSessionEndsGracefully(t *testing.T) {
	t.Run("Close", func(t *testing.T) {
		cfg, ended := tlsRelay(t, "250 PIPELINING")
		client := newClient(t, cfg)
		if _, err := client.Send(t.Context(), numbered(0)); err != nil {
			t.Fatal(err)
		}
		client.Close()
		if !<-ended {
			t.Error("the relay did not see the end of TLS after QUIT")
		}
	})
	t.Run("a connection that is abandoned before it is ready", func(t *testing.T) {
		cfg, ended := tlsRelay(t, "250 AUTH X-OTHER")
		cfg.Username, cfg.Password = "ann", "s3cret"
		client := newClient(t, cfg)
		if _, err := client.Send(t.Context(), numbered(0)); err == nil {
			t.Fatal("got no error")
		}
		if !<-ended {
			t.Error("the relay did not see the end of TLS after QUIT")
		}
	})
	t.Run("a message that is abandoned", func(t *testing.T) {
		cfg, ended := tlsRelay(t, "250 PIPELINING")
		client := newClient(t, cfg)
		m := numbered(0)
		m.Body = failingBody{}
		if _, err := client.Send(t.Context(), m); err == nil {
			t.Fatal("got no error")
		}
		if <-ended {
			t.Error("the relay saw the end of TLS in the middle of a message")
		}
	})
}
