// Here belongs what a hostile relay, or somebody in front of it, can make the client tell, believe or spend: echoes of the
// credentials, words made to pass for others, challenges without end, refusals in the clear.
package smtprelay_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// relayOf returns a Dial that connects to a relay which serve plays.
func relayOf(serve func(in *bufio.Reader, conn net.Conn)) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		client, server := netpipe.New(0)
		go func() { // ends with the connection
			defer server.Close()
			serve(bufio.NewReader(server), server)
		}()
		return client, nil
	}
}

// runsOf returns the runs of twelve characters of a secret, and of its base64, that nobody may see.
func runsOf(secret string, responses ...string) map[string]bool {
	forms := []string{secret, hex.EncodeToString([]byte(secret))}
	for _, s := range append(responses, secret) { // as a text a response has the user's name in it, which may be shown
		forms = append(forms, base64.RawStdEncoding.EncodeToString([]byte(s)))
	}
	runs := map[string]bool{}
	for _, form := range forms {
		form = squeezed(form)
		for i := 0; i+12 <= len(form); i++ {
			runs[form[i:i+12]] = true
		}
	}
	return runs
}

// squeezed is text in lower case, without blanks and ends of lines; what was redacted keeps its neighbours apart.
func squeezed(text string) string {
	text = strings.ReplaceAll(text, "[redacted]", "\x00")
	return strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return unicode.ToLower(r)
	}, text)
}

// shownOf returns a run that stands in text.
func shownOf(runs map[string]bool, text string) string {
	text = squeezed(text)
	for i := 0; i+12 <= len(text); i++ {
		if runs[text[i:i+12]] {
			return text[i : i+12]
		}
	}
	return ""
}

// echoer is a relay that answers each command in a way that goes on, or not, and says back what it was given in AUTH.
type echoer struct {
	secrets []string // the first one is the key, the others are responses
	given   atomic.Bool
	echoes  atomic.Int64
}

// echo returns a part of a secret, encoded, folded and spaced as a hostile relay may.
func (e *echoer) echo(code int) string {
	e.echoes.Add(1)
	s := e.secrets[rand.N(len(e.secrets))]
	switch rand.N(6) {
	case 0:
		s = base64.StdEncoding.EncodeToString([]byte(s))
	case 1:
		s = base64.StdEncoding.EncodeToString([]byte("xyz"[:rand.N(3)] + s))
	case 2:
		s = hex.EncodeToString([]byte(s))
	}
	if rand.N(2) == 0 {
		from := rand.N(len(s))
		s = s[from:min(len(s), from+8+rand.N(40))]
	}
	switch rand.N(6) {
	case 0:
		s = strings.ToUpper(s)
	case 1:
		s = strings.ToLower(s)
	case 2:
		s = strings.Join(strings.Split(s, ""), " ")
	}
	words := []string{"no ", "Ok: queued as ", "5.7.8 ", "", "unknown command: AUTH PLAIN ", "id="}[rand.N(6)]
	reply := ""
	for rand.N(3) == 0 && len(s) > 1 {
		n := 1 + rand.N(len(s)-1)
		reply += fmt.Sprintf("%d-%s%s\r\n", code, words, s[:n])
		s, words = s[n:], ""
	}
	return reply + fmt.Sprintf("%d %s%s\r\n", code, words, s)
}

func (e *echoer) serve(in *bufio.Reader, conn net.Conn) {
	greeting := "220 relay\r\n"
	if e.given.Load() { // on another connection
		greeting = e.echo(220)
	}
	io.WriteString(conn, greeting)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		code := 250
		switch verb, _, _ := strings.Cut(strings.TrimSpace(line), " "); verb {
		case "EHLO":
			keyword := "250-relay\r\n"
			if e.given.Load() {
				keyword += "250-X-" + e.secrets[0] + "\r\n"
			}
			io.WriteString(conn, keyword+"250-PIPELINING\r\n250 AUTH PLAIN XOAUTH2 LOGIN\r\n")
			continue
		case "AUTH":
			if strings.HasPrefix(line, "AUTH LOGIN") { // with the user's name
				io.WriteString(conn, "334 UGFzc3dvcmQ6\r\n")
				in.ReadString('\n')
			}
			e.given.Store(true)
			code = []int{235, 235, 235, 235, 235, 235, 535, 454}[rand.N(8)]
		case "RCPT":
			code = []int{250, 250, 250, 550, 450, 452}[rand.N(6)]
		case "DATA":
			code = 354
			if rand.N(8) == 0 {
				code = 554
			}
		case ".":
			code = []int{250, 250, 250, 554, 451}[rand.N(5)]
		case "MAIL", "RSET", "QUIT":
			if rand.N(20) == 0 {
				code = []int{421, 550, 354}[rand.N(3)]
			}
		default:
			continue // of the body
		}
		answer := e.echo(code)
		switch rand.N(40) {
		case 0:
			answer = answer[2:] // malformed
		case 1:
			answer += e.echo(250) // unasked
		case 2:
			answer += e.echo(421)
		}
		if _, err := io.WriteString(conn, answer); err != nil {
			return
		}
	}
}

func TestEchoesOfTheCredentialsAreShownToNobody(t *testing.T) {
	const echoes = 100_000
	for name, auth := range map[string]func(ctx context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error){
		"password": nil,
		"Config.Auth, PLAIN": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewPlainClient("", secretUser, secretKey), nil
		},
		"Config.Auth, LOGIN": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewLoginClient(secretUser, secretKey), nil
		},
		"Config.Auth, a bearer token": func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return bearer{}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			relay := &echoer{secrets: []string{secretKey}}
			switch name {
			case "password", "Config.Auth, PLAIN":
				relay.secrets = append(relay.secrets, "\x00"+secretUser+"\x00"+secretKey)
			case "Config.Auth, a bearer token":
				relay.secrets = append(relay.secrets, bearerResponse)
			}
			runs := runsOf(relay.secrets[0], relay.secrets[1:]...)
			var mu sync.Mutex // guards shown
			shown := 0
			see := func(what, text string) {
				mu.Lock()
				defer mu.Unlock()
				if run := shownOf(runs, text); run != "" {
					if shown++; shown <= 5 {
						t.Errorf("%s shows %q: %q", what, run, text)
					}
				}
			}
			seeReply := func(what string, r smtprelay.Reply) { see(what, r.Message) }
			var logged lockedBuffer
			log := smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
			trace := *log
			trace.Reply = func(ctx context.Context, conn int64, op smtprelay.Op, r smtprelay.Reply) {
				seeReply("Trace.Reply", r)
				see("Reply.String", r.String())
				log.Reply(ctx, conn, op, r)
			}
			trace.ConnClosed = func(ctx context.Context, c smtprelay.CloseInfo) {
				see("CloseInfo", fmt.Sprint(c.Err))
				log.ConnClosed(ctx, c)
			}
			trace.DialDone = func(ctx context.Context, d smtprelay.DialInfo) {
				see("DialInfo", fmt.Sprintf("%v", d))
				log.DialDone(ctx, d)
			}
			for relay.echoes.Load() < echoes/4 && !t.Failed() {
				relay.given.Store(false) // nothing by this Client
				cfg := smtprelay.Config{
					Addr: "relay.example:25", TLS: smtprelay.TLSNone, LocalName: "client.example", Dial: relayOf(relay.serve), Auth: auth, Trace: &trace,
					Retry: smtprelay.Retry{MaxAttempts: 1}, Limits: smtprelay.Limits{MaxConns: 2},
				}
				if auth == nil {
					cfg.Username, cfg.Password = secretUser, secretKey
				}
				client, err := smtprelay.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				for range 20 {
					receipt, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example", "c@y.example"}, Body: smtprelay.Bytes([]byte("x\r\n"))})
					see("QueueID", receipt.QueueID)
					seeReply("Receipt", receipt.Reply)
					for _, r := range receipt.Recipients {
						seeReply("RecipientReceipt", r.Reply)
						see("RecipientReceipt", r.QueueID)
					}
					if e, ok := errors.AsType[*smtprelay.Error](err); ok {
						see("Error", e.Error())
						seeReply("Error.Reply", e.Reply)
						for _, r := range e.Refused {
							seeReply("Refused", r.Reply)
						}
						if strings.ContainsAny(e.Error(), "\r\n\x1b\x00") {
							t.Errorf("not one line: %q", e.Error())
						}
						if e.Op == smtprelay.OpAuth || e.Op == smtprelay.OpWait {
							break // the credentials are paused
						}
					}
				}
				client.Close()
				for line := range strings.SplitSeq(logged.String(), "\n") {
					see("LogTrace", line)
				}
				logged.reset()
			}
		})
	}
}

func (l *lockedBuffer) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

const bearerResponse = "user=" + secretUser + "\x01auth=Bearer " + secretKey + "\x01\x01"

// bearer is XOAUTH2.
type bearer struct{}

func (bearer) Start() (string, []byte, error) { return "XOAUTH2", []byte(bearerResponse), nil }

// Next has the challenge in its error, as mechanisms do.
func (bearer) Next(challenge []byte) ([]byte, error) {
	return nil, fmt.Errorf("token refused: %s", challenge)
}

func TestTokenInTheChallengeOfItsRefusalIsNotShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return bearer{}, nil },
			Dial: relayOf(func(in *bufio.Reader, conn net.Conn) {
				io.WriteString(conn, "220 relay\r\n")
				for {
					line, err := in.ReadString('\n')
					switch {
					case err != nil:
						return
					case strings.HasPrefix(line, "EHLO"):
						io.WriteString(conn, "250-relay\r\n250 AUTH XOAUTH2\r\n")
					case strings.HasPrefix(line, "AUTH"):
						io.WriteString(conn, "334 "+base64.StdEncoding.EncodeToString([]byte(`{"status":"401\n\u001b","token":"`+secretKey+`"}`+"\n\x1b"))+"\r\n")
					default:
						io.WriteString(conn, "535 5.7.8 "+strings.ToUpper(secretKey)+"\r\n")
					}
				}
			}),
		})
		_, err := client.Send(t.Context(), numbered(0))
		if run := shownOf(runsOf(secretKey), fmt.Sprint(err)); run != "" || !strings.Contains(fmt.Sprint(err), "[redacted]") || strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("got %v", err)
		}
	})
}

func TestChallengesWithoutEndAreGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Int64
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return talker{}, nil },
			Dial: relayOf(func(in *bufio.Reader, conn net.Conn) {
				io.WriteString(conn, "220 relay\r\n")
				for {
					line, err := in.ReadString('\n')
					switch {
					case err != nil:
						return
					case strings.HasPrefix(line, "EHLO"):
						io.WriteString(conn, "250-relay\r\n250 AUTH X-TALK\r\n")
					default:
						answers.Add(1)
						io.WriteString(conn, "334 \r\n")
					}
				}
			}),
		})
		_, err := client.Send(t.Context(), numbered(0))
		if e := failure(err); e.Op != smtprelay.OpAuth || !strings.Contains(err.Error(), "more than 10 challenges") {
			t.Errorf("got %v", err)
		}
		if n := answers.Load(); n > 13 { // AUTH, ten answers, "*", QUIT
			t.Errorf("the client has said %d lines", n)
		}
	})
}

// talker is a mechanism that always has an answer.
type talker struct{}

func (talker) Start() (string, []byte, error)        { return "X-TALK", nil, nil }
func (talker) Next(challenge []byte) ([]byte, error) { return []byte("and then?"), nil }

func TestSlowChallengesAreBoundedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1}, Timeouts: smtprelay.Timeouts{Command: time.Minute},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return talker{}, nil },
			Dial: relayOf(func(in *bufio.Reader, conn net.Conn) {
				io.WriteString(conn, "220 relay\r\n")
				for {
					line, err := in.ReadString('\n')
					switch {
					case err != nil:
						return
					case strings.HasPrefix(line, "EHLO"):
						io.WriteString(conn, "250-relay\r\n250 AUTH X-TALK\r\n")
					default:
						time.Sleep(25 * time.Second)
						io.WriteString(conn, "334 \r\n")
					}
				}
			}),
		})
		began := time.Now()
		_, err := client.Send(t.Context(), numbered(0))
		if e := failure(err); e.Op != smtprelay.OpAuth || !e.Timeout() || time.Since(began) != time.Minute {
			t.Errorf("after %v: got %v", time.Since(began), err)
		}
		client.Close()
		time.Sleep(time.Minute) // for the relay to end
	})
}

func TestWhatIsSaidInTheClearWhereTLSIsRequiredIsNeverPermanent(t *testing.T) {
	const ready, offer = "220 relay\r\n", "250-relay\r\n250 STARTTLS\r\n"
	for _, tt := range []struct {
		why    string
		tls    smtprelay.TLSMode
		script []string // the greeting, and what is said to each command
	}{
		{"greeting", smtprelay.TLSStartTLS, []string{"554 go away\r\n"}},
		{"EHLO", smtprelay.TLSStartTLS, []string{ready, "554 go away\r\n"}},
		{"EHLO not known", smtprelay.TLSStartTLS, []string{ready, "502 what?\r\n"}},
		{"EHLO for now", smtprelay.TLSStartTLS, []string{ready, "451 later\r\n"}},
		{"no STARTTLS offered", smtprelay.TLSStartTLS, []string{ready, "250 relay\r\n"}},
		{"STARTTLS refused", smtprelay.TLSStartTLS, []string{ready, offer, "554 no\r\n"}},
		{"an alert in place of TLS", smtprelay.TLSStartTLS, []string{ready, offer, "220 go\r\n\x15\x03\x03\x00\x02\x02\x28"}},
		{"an alert", smtprelay.TLSImplicit, []string{"\x15\x03\x03\x00\x02\x02\x28"}},
		{"protocol version", smtprelay.TLSImplicit, []string{"\x15\x03\x03\x00\x02\x02\x46"}},
		{"a refusal in place of TLS", smtprelay.TLSImplicit, []string{"554 go away\r\n"}},
		{"a greeting in place of TLS", smtprelay.TLSImplicit, []string{ready}},
		{"no reply at all", smtprelay.TLSStartTLS, []string{"HTTP/1.1 400 Bad Request\r\n"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var dials atomic.Int64
				client := newClient(t, smtprelay.Config{
					Addr: "relay.example:587", TLS: tt.tls, Retry: smtprelay.Retry{MaxAttempts: 2},
					Dial: relayOf(func(in *bufio.Reader, conn net.Conn) {
						dials.Add(1)
						for i, words := range tt.script {
							if i > 0 || tt.tls == smtprelay.TLSImplicit {
								if _, err := in.ReadByte(); err != nil {
									return
								}
							}
							if i > 0 {
								in.ReadString('\n')
							}
							io.WriteString(conn, words)
						}
						io.Copy(io.Discard, in)
					}),
				})
				_, err := client.Send(t.Context(), numbered(0))
				if e := failure(err); !e.Temporary() || e.Outcome != smtprelay.NotAccepted {
					t.Errorf("got %v, want an error that is temporary", err)
				}
				t.Log(err, dials.Load())
			})
		})
	}
}

func TestErrorIsOneLineWhateverTheRelayAndTheUserWrite(t *testing.T) {
	const forged = "x\x1b[2J\x00\u202e\u2028\u0085"
	for _, tt := range []struct{ why, offer, rcpt, to string }{
		{"a refusal of lines that look like ours", "250 relay\r\n", "550-x\r\n550-2026/11/30 02:00:00 smtprelay: accepted, queued as FORGED\r\n550 " + forged + "\r\n", "b@y.example"},
		{"a refusal with our advice", "250 relay\r\n", "550 no\"; check Username and Password\r\n", "b@y.example"},
		{"a bare CR", "250 relay\r\n", "550 no\rsmtprelay: accepted\r\n", "b@y.example"},
		{"a malformed reply", "250 relay\r\n", "what?" + forged + "\r\n", "b@y.example"},
		{"keywords", "250-relay\r\n250 AUTH" + forged + "\r\n", "550 no\r\n", "b@y.example"},
		{"mechanisms", "250-relay\r\n250 AUTH " + forged + "\r\n", "550 no\r\n", "b@y.example"},
		{"an address", "250 relay\r\n", "550 no\r\n", "b\r\nsmtprelay: \x1b[2J\u202e@y.example"},
		{"a long address", "250 relay\r\n", "550 no\r\n", strings.Repeat("b", 100_000) + "@y.example"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var logged bytes.Buffer
				cfg := smtprelay.Config{
					Addr: "relay.example:25", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1}, Limits: smtprelay.Limits{MaxConns: 1},
					Trace: smtprelay.LogTrace(slog.New(&plainHandler{out: &logged})),
					Dial: relayOf(func(in *bufio.Reader, conn net.Conn) {
						io.WriteString(conn, "220 relay\r\n")
						for {
							line, err := in.ReadString('\n')
							switch {
							case err != nil:
								return
							case strings.HasPrefix(line, "EHLO"):
								io.WriteString(conn, tt.offer)
							case strings.HasPrefix(line, "RCPT"):
								io.WriteString(conn, tt.rcpt)
							default:
								io.WriteString(conn, "250 ok\r\n")
							}
						}
					}),
				}
				if strings.Contains(tt.offer, "AUTH") {
					cfg.Username, cfg.Password = "ann", "password-0123456789"
				}
				client := newClient(t, cfg)
				_, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{tt.to}, Body: smtprelay.Bytes([]byte("x"))})
				if err == nil {
					t.Fatal("no error")
				}
				client.Close()
				for _, text := range []string{err.Error(), strings.ReplaceAll(logged.String(), "\n\n", "")} {
					for _, r := range text {
						if !unicode.IsPrint(r) {
							t.Errorf("%U in %q", r, text)
							break
						}
					}
				}
				if len(err.Error()) > 5000 {
					t.Errorf("%d octets of error", len(err.Error()))
				}
				if strings.Contains(err.Error(), `no"; check`) {
					t.Errorf("the relay's words pass for ours: %s", err)
				}
			})
		})
	}
}

// plainHandler logs as a program may that trusts what it is given: nothing is escaped. Records end with two line ends.
type plainHandler struct {
	slog.Handler
	out *bytes.Buffer
	mu  sync.Mutex // guards what out points to
}

func (h *plainHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.out.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(h.out, " %s=%v", a.Key, a.Value.Any())
		return true
	})
	h.out.WriteString("\n\n")
	return nil
}
