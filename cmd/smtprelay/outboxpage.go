package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
	"github.com/smtprelay/smtprelay/outbox"
)

//go:embed outboxpage
var outboxEmbedded embed.FS

// outboxPages are the files of the page.
var outboxPages = func() fs.FS {
	sub, err := fs.Sub(outboxEmbedded, "outboxpage")
	if err != nil {
		panic(err) // it is not in the program
	}
	return sub
}()

func newOutboxPage(store *storeFlags) *cobra.Command {
	var listen, tokenFile string
	cmd := &cobra.Command{
		Use:   "page",
		Short: "Show the outbox on a web page, where a person can decide",
		Long: `Page serves a web page that shows how many messages are queued, being sent, unknown and dead, how the queue grows, and the messages;
and lets you resolve, requeue and cancel them. It shows headers and no bodies. It prints the page's address, and ends with Ctrl-C.

On loopback the page is open to who can reach it: all users of this machine. With --token-file it needs a token there too; elsewhere it
always needs one, which is printed unless --token-file has it. It speaks HTTP without TLS: put a proxy before it where others
can listen. It loads nothing from elsewhere.`,
		Args: takes(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, _, err := net.SplitHostPort(listen); err != nil {
				return fmt.Errorf("--http %q: want HOST:PORT, such as 127.0.0.1:8026", listen)
			}
			token, err := secretFile("--token-file", tokenFile)
			if err := errors.Join(err, guard.CheckToken(token)); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			cmd.SetContext(ctx)
			each := *store
			each.timeout = 0
			return each.with(cmd, func(ctx context.Context, box *outbox.Outbox) error {
				l, err := net.Listen("tcp", listen)
				if err != nil {
					return err
				}
				p := &outboxPage{box: box, timeout: store.timeout}
				g := guard.New(l, token, outboxPages)
				server := g.Server(ctx, p.routes())
				fmt.Fprintf(cmd.OutOrStdout(), "Page: %s\n", g.URL(l.Addr()))
				if tokenFile == "" && g.Token() != "" {
					fmt.Fprintf(cmd.OutOrStdout(), "Token: %s\n", g.Token())
				}
				ended := make(chan struct{})
				context.AfterFunc(ctx, func() {
					defer close(ended)
					quit, cancel := context.WithTimeout(context.Background(), 2*time.Second)
					defer cancel()
					if server.Shutdown(quit) != nil {
						_ = server.Close()
					}
				})
				if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
					return err
				}
				<-ended // the store is closed after the requests
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&listen, "http", "127.0.0.1:8026", "`address` of the page")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "`file` that holds the token of the page")
	return cmd
}

// secretFile reads a secret from the file that a flag names; "" if it names none.
func secretFile(flag, file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	secret := strings.TrimRight(string(text), "\r\n")
	if err == nil && secret == "" {
		err = fmt.Errorf("%s %s: the file is empty", flag, file)
	}
	return secret, err
}

// outboxPage is the page of an outbox and its API.
type outboxPage struct {
	box     *outbox.Outbox
	timeout time.Duration // of the store, for a request; 0: none

	mu      sync.Mutex // guards the fields below; held while the store counts, so that many pages ask it once
	counted counts
}

func (p *outboxPage) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { guard.Page(w, outboxPages, "index.html", http.StatusOK) })
	for _, name := range []string{"page.js", "page.css", "icon.svg"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, _ *http.Request) { guard.Page(w, outboxPages, name, http.StatusOK) })
	}
	api := func(pattern string, handle func(context.Context, *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			ctx := r.Context()
			if p.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, p.timeout)
				defer cancel()
			}
			r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
			v, err := handle(ctx, r)
			if err == nil {
				guard.Answer(w, http.StatusOK, v)
				return
			}
			status := http.StatusBadGateway // the store
			if e, ok := errors.AsType[*exit](err); ok {
				status = map[int]int{exitUsage: http.StatusBadRequest, exitNotPossible: http.StatusConflict}[e.code]
			}
			guard.Fail(w, status, strings.TrimPrefix(err.Error(), "outbox: "))
		})
	}
	api("GET /api/v1/counts", func(ctx context.Context, _ *http.Request) (any, error) { return p.count(ctx) })
	api("GET /api/v1/messages", p.list)
	api("GET /api/v1/message", p.message)
	api("POST /api/v1/message", p.decide)
	mux.HandleFunc("/api/", func(w http.ResponseWriter, _ *http.Request) {
		guard.Fail(w, http.StatusNotFound, "there is no such address in the API")
	})
	return mux
}

// count asks the store once a second at most.
func (p *outboxPage) count(ctx context.Context) (counts, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.counted.Time) < time.Second {
		return p.counted, nil
	}
	c, err := count(ctx, p.box)
	if err == nil {
		p.counted = c
	}
	return c, err
}

// wrong is the error of a request that is.
func wrong(format string, args ...any) error { return &exit{exitUsage, fmt.Errorf(format, args...)} }

// query returns the parameters of a request. One that is not known is an error, since it may be a filter that is spelt wrong.
func query(r *http.Request, known ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, wrong("the query cannot be read")
	}
	for key := range q {
		if !slices.Contains(known, key) {
			return nil, wrong("the parameter %q: want %s", key, strings.Join(known, ", "))
		}
	}
	return q, nil
}

// mostOnPage is how many messages are in an answer at most.
const mostOnPage = 500

func (p *outboxPage) list(ctx context.Context, r *http.Request) (any, error) {
	q, err := query(r, "state", "tenant", "to", "after", "limit")
	if err != nil {
		return nil, err
	}
	f := filter{states: []string{"unknown", "dead", "sending", "queued"}, tenant: q.Get("tenant"), tenantOnly: q.Has("tenant"), to: q.Get("to"), after: q.Get("after"), limit: 50}
	if q.Has("state") {
		f.states = q["state"]
	}
	if q.Has("limit") {
		if f.limit, err = strconv.Atoi(q.Get("limit")); err != nil || f.limit < 1 || f.limit > mostOnPage {
			return nil, wrong("limit: want 1 to %d", mostOnPage)
		}
	}
	var answer struct {
		Messages []itemRecord `json:"messages"`
		More     string       `json:"more"` // after, for the next page; "" if there is none
	}
	answer.Messages = []itemRecord{}
	answer.More, err = f.page(ctx, p.box, func(i *outbox.Item) error {
		answer.Messages = append(answer.Messages, itemOf(i))
		return nil
	})
	return answer, err
}

func (p *outboxPage) message(ctx context.Context, r *http.Request) (any, error) {
	q, err := query(r, "id")
	if err != nil {
		return nil, err
	}
	i, header, err := item(ctx, p.box, q.Get("id"))
	if err != nil {
		return nil, err
	}
	m := itemOf(&i)
	m.Header = header
	return m, nil
}

func (p *outboxPage) decide(ctx context.Context, r *http.Request) (any, error) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return nil, wrong("the Content-Type: want application/json")
	}
	var order struct {
		ID   string `json:"id"`
		Deed string `json:"deed"`
		// Changed is that of the message as it was seen: one that has changed since is left alone.
		Changed time.Time `json:"changed"`
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&order); err != nil {
		return nil, wrong("the body cannot be read: want {\"id\", \"deed\", \"changed\"}")
	}
	deed, ok := deeds[order.Deed]
	if !ok {
		return nil, wrong("deed: want sent, resend, drop, requeue or cancel")
	}
	i, err := p.box.Status(ctx, order.ID)
	if err != nil {
		return nil, impossible(order.ID, err)
	}
	if !i.Changed.Equal(order.Changed) {
		return nil, &exit{exitNotPossible, fmt.Errorf("message %q has changed since it was shown: it is %v now; look at it again", order.ID, i.State)}
	}
	state, err := decide(ctx, p.box, order.ID, deed)
	return map[string]string{"id": order.ID, "state": state.String()}, err
}
