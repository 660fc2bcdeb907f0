// Examples of what a service does with a Client, from sending to what went wrong, AUTH and Trace. That of bodies has a file of its
// own: go doc shows the type in it along with it.
package smtprelay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mail to one recipient. A program makes one Client, at its start, and shares it.
func ExampleClient_Send() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config()) // really: smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")}
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("From: shop@example.com\r\n" +
			"To: ann@example.org\r\n" +
			"Subject: Your order\r\n" +
			"\r\n" +
			"It is ready.\r\n")),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(receipt.Reply.Code, receipt.Recipients[0].To, receipt.Recipients[0].Outcome)
	fmt.Println("the relay names it:", receipt.QueueID == relay.Messages()[0].ID)
	// Output:
	// 250 ann@example.org accepted
	// the relay names it: true
}

// A mail to each of many recipients, as many at a time as the connections can carry. The messages are made as they are
// needed, and results come in the order of completion.
func ExampleClient_SendAll() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	readers := []string{"ann@example.org", "bob@example.org", "gone@example.org", "eve@example.org"}
	messages := func(yield func(smtprelay.Message) bool) {
		for _, to := range readers {
			text := "From: news@example.com\r\nTo: " + to + "\r\nSubject: News\r\n\r\nThere is news.\r\n"
			if !yield(smtprelay.Message{
				From: "news@example.com",
				To:   []string{to},
				Body: smtprelay.Bytes([]byte(text)),
			}) {
				return
			}
		}
	}
	var lines []string
	for r := range client.SendAll(context.Background(), messages) {
		if r.Err != nil {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": ", r.Err))
		} else {
			lines = append(lines, fmt.Sprint(r.Message.To[0], ": accepted"))
		}
	}
	slices.Sort(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
	// Output:
	// ann@example.org: accepted
	// bob@example.org: accepted
	// eve@example.org: accepted
	// gone@example.org: smtprelay: RCPT TO <gone@example.org>: 550 5.1.1 "no such user"
}

// At the start of a service: are address and key right? Better known now than at the first mail.
func ExampleClient_Ping() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Password = "yesterday's key"
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // a relay may say nothing at all
	defer cancel()
	err = client.Ping(ctx)
	var e *smtprelay.Error
	if errors.As(err, &e) {
		fmt.Println(e.Op, e.Reply.Code, e.Scope)
	}
	// Output:
	// auth 535 relay
}

// A readiness probe: does the relay take this service's mail? An open connection is proof enough, so that a probe every few
// seconds costs the relay nothing. Let it not end the service: mail waits for a relay that comes back.
func ExampleClient_Ping_readiness() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ready := func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second) // less than the probe's own time limit
		defer cancel()
		if err := client.Ping(ctx); err != nil {
			http.Error(w, "mail: "+err.Error(), http.StatusServiceUnavailable)
		}
	}

	for range 2 {
		w := httptest.NewRecorder()
		ready(w, httptest.NewRequest("GET", "/readyz", nil))
		fmt.Println(w.Code, relay.Stats().Conns)
	}
	// Output:
	// 200 1
	// 200 1
}

// Stats goes into expvar as it is: a page at /debug/vars shows it as JSON.
func ExampleClient_Stats() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	expvar.Publish("mail", expvar.Func(func() any { return client.Stats() }))

	_ = client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n"))
	var shown struct{ Accepted, OpenConns int }
	if err := json.Unmarshal([]byte(expvar.Get("mail").String()), &shown); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%+v\n", shown)
	// Output:
	// {Accepted:1 OpenConns:1}
}

// The end of a program: take no more, finish what is under way, say QUIT, and do not wait for ever.
func ExampleClient_Shutdown() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	msg := []byte("Subject: hello\r\n\r\nHello.\r\n")
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, msg))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fmt.Println(client.Shutdown(ctx))

	err = client.SendMail("shop@example.com", []string{"bob@example.org"}, msg)
	fmt.Println(errors.Is(err, smtprelay.ErrClosed), smtprelay.ShouldRetry(err))
	// Output:
	// <nil>
	// <nil>
	// true true
}

// A service with one setting for its mail.
func ExampleParseURL() {
	cfg, err := smtprelay.ParseURL("smtps://apikey:SG.secret@smtp.sendgrid.net:465?max_conns=4")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(cfg.Addr, cfg.Username, cfg.Limits.MaxConns)
	fmt.Println(cfg.TLS == smtprelay.TLSImplicit)
	// Output:
	// smtp.sendgrid.net:465 apikey 4
	// true
}

// What a service does with an error: its Outcome says whether the message may be sent again, and to whom.
func ExampleError() {
	relay := smtptest.NewUnstartedServer()
	relay.Reject = map[string]string{
		"gone@example.org": "550 5.1.1 no such user",
		"full@example.org": "452 4.2.2 mailbox full",
	}
	relay.Start()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	send := func(to ...string) {
		receipt, err := client.Send(context.Background(), smtprelay.Message{
			From: "shop@example.com",
			To:   to,
			Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
		})
		var e *smtprelay.Error
		switch {
		case err == nil:
			fmt.Println("accepted for all, code", receipt.Reply.Code)
		case !errors.As(err, &e) || e.Outcome == smtprelay.Unknown:
			fmt.Println("perhaps accepted: a person decides")
		case e.Outcome == smtprelay.Accepted:
			for _, r := range e.Recipients {
				if r.Outcome != smtprelay.Accepted {
					fmt.Println("accepted, but not for", r.To, "who got", r.Reply.Code)
				}
			}
		case smtprelay.ShouldRetry(err):
			fmt.Println("later:", e.Reply.Code)
		default:
			fmt.Println("never:", e.Reply.Code)
		}
	}
	send("ann@example.org")
	send("ann@example.org", "gone@example.org")
	send("full@example.org")
	send("gone@example.org")

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Drop: true}) // the connection is lost before the reply
	send("ann@example.org")
	// Output:
	// accepted for all, code 250
	// accepted, but not for gone@example.org who got 550
	// later: 452
	// never: 550
	// perhaps accepted: a person decides
}

// A relay with greylisting refuses the first try of each new recipient with a 4xx reply. By default that is told to the
// caller, who knows better how long the message can wait; with On4xx the client tries again by itself.
func ExampleRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 greylisted, try again"})

	cfg := relay.Config()
	cfg.Retry = smtprelay.Retry{
		On4xx:       true,
		MaxAttempts: 3,
		MinBackoff:  time.Millisecond, // really: minutes, for greylisting, since a random part is waited
		MaxBackoff:  10 * time.Millisecond,
	}
	cfg.Trace = &smtprelay.Trace{
		Retry: func(_ context.Context, r smtprelay.RetryInfo) {
			fmt.Printf("try %d failed: %v\n", r.Attempt, r.Err)
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
	})
	fmt.Println(receipt.Reply.Code, err)
	// Output:
	// try 1 failed: smtprelay: RCPT TO <ann@example.org>: 451 4.7.1 "greylisted, try again"
	// 250 <nil>
}

// ShouldRetry is the one question before a message goes back into a queue.
func ExampleShouldRetry() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	m := smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
	}

	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 try again later"})
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.ShouldRetry(err), err)

	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true}) // taken, and lost before the relay could say so
	_, err = client.Send(context.Background(), m)
	fmt.Println(smtprelay.ShouldRetry(err), smtprelay.OutcomeOf(err))
	fmt.Println("at the relay:", relay.Stats().Accepted)
	// Output:
	// true smtprelay: end of the message: 451 4.3.0 "try again later"
	// false unknown
	// at the relay: 1
}

// tokens stands for what hands out OAuth tokens, such as an oauth2.TokenSource.
type tokens struct{}

func (tokens) Token(context.Context) (string, error) { return "ya29.token", nil }

// OAuth: Auth is asked once for each connection, so that the token it returns is always a fresh one.
func ExampleConfig_auth() {
	var source tokens
	relay := smtptest.NewUnstartedServer()
	relay.Mechanisms = []string{sasl.OAuthBearer}
	relay.SASL = func(string) (smtptest.SASLServer, error) {
		return sasl.NewOAuthBearerServer(func(opts sasl.OAuthBearerOptions) *sasl.OAuthBearerError {
			fmt.Println("relay:", opts.Username, opts.Token)
			return nil
		}), nil
	}
	relay.Start()
	defer relay.Close()

	cfg := relay.Config()
	cfg.Username, cfg.Password = "", ""
	cfg.Auth = func(ctx context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		token, err := source.Token(ctx)
		if err != nil {
			return nil, err
		}
		return sasl.NewOAuthBearerClient(&sasl.OAuthBearerOptions{Username: "shop@example.com", Token: token}), nil
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println("ping:", client.Ping(context.Background()))
	// Output:
	// relay: shop@example.com ya29.token
	// ping: <nil>
}

// A key that is replaced while the program runs: each new connection takes the present one, and those that are open go on.
func ExampleConfig_rotatingKey() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	user, key := cfg.Username, cfg.Password // really: read from where the key is kept, each time
	cfg.Username, cfg.Password = "", ""
	cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
		return sasl.NewPlainClient("", user, key), nil
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client.Ping(context.Background()))
	// Output:
	// <nil>
}

// Counting and timing: hooks get the context of the Send that they belong to, so a span can hang on it.
func ExampleTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Trace = &smtprelay.Trace{
		DialDone: func(_ context.Context, d smtprelay.DialDoneInfo) {
			fmt.Println("connection", d.Conn, "ready:", d.Err == nil)
		},
		SendDone: func(_ context.Context, s smtprelay.SendDoneInfo) {
			fmt.Println("sent to", s.Message.To, "error:", s.Err)
			_ = s.Took // goes into a histogram
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, to := range []string{"ann@example.org", "bob@example.org"} {
		_ = client.SendMail("shop@example.com", []string{to}, []byte("Subject: hello\r\n\r\nHello.\r\n"))
	}
	// Output:
	// connection 1 ready: true
	// sent to [ann@example.org] error: <nil>
	// sent to [bob@example.org] error: <nil>
}

// LogTrace logs what an operator should see and, at debug level, the dialogue: without secrets and bodies.
func ExampleLogTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	var logged bytes.Buffer // really: os.Stderr
	cfg := relay.Config()
	cfg.Trace = smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n")))
	client.Close()

	for _, words := range []string{`line="AUTH PLAIN [redacted]"`, `line="RCPT TO:<ann@example.org>"`, `msg="smtp message accepted"`, "Hello."} {
		fmt.Println(words, strings.Contains(logged.String(), words))
	}
	// Output:
	// <nil>
	// line="AUTH PLAIN [redacted]" true
	// line="RCPT TO:<ann@example.org>" true
	// msg="smtp message accepted" true
	// Hello. false
}
