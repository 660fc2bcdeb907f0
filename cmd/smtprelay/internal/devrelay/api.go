package devrelay

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
)

const (
	mostListed = 500              // messages, connections or refusals in one answer
	mostWaited = 10 * time.Minute // for a message or a fault
	maxRequest = 64 << 10         // octets of a request's body
	calm       = 100 * time.Millisecond
)

//go:embed page
var embedded embed.FS

// pages are the files of the page.
var pages = func() fs.FS {
	sub, err := fs.Sub(embedded, "page")
	if err != nil {
		panic(err) // it is not in the program
	}
	return sub
}()

// routes are the page and the API. cmd/smtprelay/SERVE.md describes the API.
func (r *Relay) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { servePage(w, "index.html", http.StatusOK) })
	for _, name := range []string{"page.js", "page.css", "icon.svg"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, _ *http.Request) { servePage(w, name, http.StatusOK) })
	}
	mux.HandleFunc("GET /mail/{id}/html", r.mailHTML)

	api := func(method, path string, handle http.HandlerFunc) { mux.HandleFunc(method+" /api/v1"+path, handle) }
	api("GET", "/relay", r.getRelay)
	api("GET", "/certificate", r.getCertificate)
	api("POST", "/links", r.postLink)
	api("GET", "/events", r.getEvents)
	api("GET", "/messages", r.getMessages)
	api("DELETE", "/messages", r.deleteMessages)
	api("GET", "/messages/wait", r.waitMessages)
	api("GET", "/messages/{id}", r.getMessage)
	api("DELETE", "/messages/{id}", r.deleteMessage)
	api("GET", "/messages/{id}/source", r.getSource)
	api("GET", "/messages/{id}/parts/{part}", r.getPart)
	api("GET", "/connections", r.getConnections)
	api("DELETE", "/connections", r.closeConnections)
	api("GET", "/connections/{n}", r.getConnection)
	api("GET", "/refusals", r.getRefusals)
	api("GET", "/faults", r.getFaults)
	api("POST", "/faults", r.postFault)
	api("DELETE", "/faults", r.deleteFaults)
	api("GET", "/faults/{id}", r.getFault)
	api("GET", "/faults/{id}/wait", r.waitFault)
	api("PATCH", "/faults/{id}", r.patchFault)
	api("DELETE", "/faults/{id}", r.deleteFault)
	mux.HandleFunc("/api/", func(w http.ResponseWriter, _ *http.Request) {
		fail(w, http.StatusNotFound, "there is no such address in the API")
	})
	return mux
}

// servePage answers with a file of the page.
func servePage(w http.ResponseWriter, name string, status int) { guard.Page(w, pages, name, status) }

// answer answers with JSON.
func answer(w http.ResponseWriter, status int, v any) { guard.Answer(w, status, v) }

// fail answers with an error.
func fail(w http.ResponseWriter, status int, text string) { guard.Fail(w, status, text) }

// query reads the parameters of a request; err is the first that is wrong.
type query struct {
	values url.Values
	err    error
}

func (q *query) number(name string, def, least, most uint64) uint64 {
	text := q.values.Get(name)
	if text == "" {
		return def
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil || n < least || n > most {
		q.wrong(fmt.Errorf("%s=%s: want a number from %d to %d", name, text, least, most))
		return def
	}
	return n
}

func (q *query) time(name string, def, most time.Duration) time.Duration {
	text := q.values.Get(name)
	if text == "" {
		return def
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > most {
		q.wrong(fmt.Errorf("%s=%s: want a time such as 10s, at most %v", name, text, most))
		return def
	}
	return d
}

func (q *query) wrong(err error) {
	if q.err == nil {
		q.err = err
	}
}

func (q *query) filter() mailFilter {
	return mailFilter{
		text:    strings.ToLower(q.values.Get("q")),
		subject: strings.ToLower(q.values.Get("subject")),
		from:    q.values.Get("from"),
		to:      q.values.Get("to"),
		after:   q.number("after", 0, 0, 1<<62),
		conn:    int(q.number("connection", 0, 0, 1<<31)),
	}
}

func (q *query) limit() int { return int(q.number("limit", 50, 1, mostListed)) }

// knownOnly notes parameters that nothing reads: a filter that is spelt wrong must not let everything through.
func (q *query) knownOnly(names string) *query {
	for name := range q.values {
		if !strings.Contains(" "+names+" ", " "+name+" ") {
			q.wrong(fmt.Errorf("there is no parameter %q: want some of %s", name, names))
		}
	}
	return q
}

func readQuery(req *http.Request, names string) *query {
	return (&query{values: req.URL.Query()}).knownOnly(names)
}

// refused answers with the query's mistake, if there is one.
func (q *query) refused(w http.ResponseWriter) bool {
	if q.err != nil {
		fail(w, http.StatusBadRequest, q.err.Error())
	}
	return q.err != nil
}

// readJSON reads the body of a request into v, strictly. It reports false if it has answered with a mistake. A page of another site
// cannot send this type without being asked for it (CORS).
func readJSON(w http.ResponseWriter, req *http.Request, v any) bool {
	if t, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type")); t != "application/json" {
		fail(w, http.StatusUnsupportedMediaType, "want Content-Type: application/json")
		return false
	}
	d := json.NewDecoder(http.MaxBytesReader(w, req.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return false
	}
	return true
}

// A state is the relay at a glance. The page asks for what its counters say has changed.
type state struct {
	Name     string   `json:"name"`
	URL      string   `json:"url"` // for smtprelay.ParseURL, without the password
	MaxConns int      `json:"max_conns"`
	Limits   string   `json:"limits"`
	Steps    []string `json:"steps"` // at which faults can strike

	Messages     int    `json:"messages"`     // that are kept
	Accepted     int    `json:"accepted"`     // that were taken
	LastMessage  uint64 `json:"last_message"` // the Seq of the latest
	Gone         uint64 `json:"gone"`         // messages deleted
	Open         int    `json:"open"`         // connections
	Connections  int    `json:"connections"`  // all there were
	Refusals     uint64 `json:"refusals"`     // all there were
	Turns        int    `json:"turns"`
	Mails        int    `json:"mails"` // MAIL commands
	MessageTurns int    `json:"message_turns"`
	FaultsOn     int    `json:"faults_on"`
	LineRev      uint64 `json:"line_rev"`  // changes with each line of a dialogue
	FaultRev     uint64 `json:"fault_rev"` // changes with each fault set, switched or struck
}

func (r *Relay) state() state {
	st := r.smtp.Stats()
	shown, _ := url.Parse(r.SMTPURL())
	if shown.User != nil {
		shown.User = url.User(shown.User.Username())
	}
	s := state{
		Name: r.cfg.Name, URL: shown.String(), MaxConns: r.cfg.MaxConns, Steps: Steps(),
		Limits:   fmt.Sprintf("%d connections, %d messages on each, %d recipients, %d octets", r.cfg.MaxConns, r.cfg.MaxMessages, r.cfg.MaxRecipients, r.cfg.MaxSize),
		Accepted: st.Accepted, Open: st.Open, Connections: st.Conns, Turns: st.Turns, Mails: st.Mails, MessageTurns: st.MessageTurns,
	}
	for _, f := range r.faults.all() {
		if f.On {
			s.FaultsOn++
		}
	}
	r.mails.mu.RLock()
	s.Messages, s.LastMessage, s.Gone = len(r.mails.mails), r.mails.last, r.mails.gone
	r.mails.mu.RUnlock()
	r.faults.mu.Lock()
	s.FaultRev = r.faults.rev
	r.faults.mu.Unlock()
	r.dialogues.mu.Lock()
	s.LineRev, s.Refusals = r.dialogues.rev, r.dialogues.refused
	s.FaultRev += r.dialogues.strikes
	r.dialogues.mu.Unlock()
	return s
}

func (r *Relay) getRelay(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, r.state()) }

func (r *Relay) getCertificate(w http.ResponseWriter, _ *http.Request) {
	text := r.certificate()
	if text == nil {
		fail(w, http.StatusNotFound, "the relay has no certificate: it was started with --tls none")
		return
	}
	w.Header().Set("Content-Type", "application/x-pem-file")
	w.Write(text)
}

func (r *Relay) postLink(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusCreated, map[string]string{"url": r.PageURL()})
}

// getEvents streams the state (server-sent events) when something changes, and not more often than calm allows: the page then
// asks for the changes. However slow a reader is, there is nothing to be kept for it.
func (r *Relay) getEvents(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w)
	for {
		changed := r.changed.heard()
		text, err := json.Marshal(r.state())
		if err == nil {
			_, err = fmt.Fprintf(w, "data: %s\n\n", text)
		}
		if err != nil || flush.Flush() != nil {
			return
		}
		for _, wait := range []<-chan struct{}{after(req.Context(), calm), changed} {
			select {
			case <-wait:
			case <-req.Context().Done():
				return
			}
		}
	}
}

// after returns a channel that is closed once the time has passed or the context has ended.
func after(ctx context.Context, d time.Duration) <-chan struct{} {
	done, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(done, cancel)
	return done.Done()
}

const filterNames = "q subject from to after connection"

func (r *Relay) getMessages(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, filterNames+" before limit")
	filter, before, limit := q.filter(), q.number("before", 0, 0, 1<<62), q.limit()
	if !q.refused(w) {
		answer(w, http.StatusOK, r.mails.page(filter, before, limit))
	}
}

func (r *Relay) deleteMessages(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, filterNames)
	filter := q.filter()
	if !q.refused(w) {
		answer(w, http.StatusOK, map[string]int{"deleted": r.mails.remove(filter.takes)})
	}
}

func (r *Relay) waitMessages(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, filterNames+" n timeout limit")
	filter, n, limit := q.filter(), int(q.number("n", 1, 1, 1<<31)), q.limit()
	timeout := q.time("timeout", 10*time.Second, mostWaited)
	if q.refused(w) {
		return
	}
	ctx, cancel := context.WithTimeout(req.Context(), timeout)
	defer cancel()
	p, err := r.mails.wait(ctx, filter, n, limit)
	if err != nil {
		fail(w, http.StatusGatewayTimeout, fmt.Sprintf("%d of %d messages have come in %v", p.Found, n, timeout))
		return
	}
	answer(w, http.StatusOK, p)
}

// mail returns the message that a request is about, or nil if it has answered that there is none.
func (r *Relay) mail(w http.ResponseWriter, req *http.Request) *Mail {
	m := r.mails.get(req.PathValue("id"))
	if m == nil {
		fail(w, http.StatusNotFound, "there is no such message: it may have been deleted, or dropped for newer ones (--keep)")
	}
	return m
}

func (r *Relay) getMessage(w http.ResponseWriter, req *http.Request) {
	m := r.mail(w, req)
	if m == nil {
		return
	}
	p := parse(m.body, maxShown)
	_, links := disarm(p.HTML)
	answer(w, http.StatusOK, struct {
		*Mail
		Header  []headerField `json:"header"`
		Text    string        `json:"text"`
		HTML    string        `json:"html"`  // as it came
		Links   []string      `json:"links"` // of the HTML
		Parts   []attachment  `json:"parts"`
		Problem string        `json:"problem,omitempty"` // why not everything was read
	}{m, notNil(p.Header), p.Text, p.HTML, notNil(links), notNil(p.Attachments), p.Problem})
}

// notNil returns the list, which in JSON is then never null.
func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (r *Relay) deleteMessage(w http.ResponseWriter, req *http.Request) {
	if m := r.mail(w, req); m != nil {
		answer(w, http.StatusOK, map[string]int{"deleted": r.mails.remove(func(x *Mail) bool { return x == m })})
	}
}

// getSource answers with the message as it came, to be shown as text or, with ?download=1, to be saved.
func (r *Relay) getSource(w http.ResponseWriter, req *http.Request) {
	m := r.mail(w, req)
	if m == nil {
		return
	}
	if req.URL.Query().Has("download") {
		serveFile(w, m.ID+".eml", m.body)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Write(m.body)
}

func (r *Relay) getPart(w http.ResponseWriter, req *http.Request) {
	m := r.mail(w, req)
	if m == nil {
		return
	}
	n, _ := strconv.Atoi(req.PathValue("part"))
	octets, name, found := part(m.body, n)
	if !found {
		fail(w, http.StatusNotFound, "the message has no such part")
		return
	}
	serveFile(w, name, octets)
}

// serveFile answers with a file that a browser saves, and that it neither shows nor runs.
func serveFile(w http.ResponseWriter, name string, octets []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": name}))
	w.Write(octets)
}

// mailHTML answers with the HTML of a message, for a frame.
func (r *Relay) mailHTML(w http.ResponseWriter, req *http.Request) {
	m := r.mail(w, req)
	if m == nil {
		return
	}
	w.Header().Set("Content-Security-Policy", mailPolicy)
	w.Header().Set("X-Frame-Options", "SAMEORIGIN")
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	page, _ := disarm(parse(m.body, maxShown).HTML)
	w.Write([]byte(withImages(page, m.body)))
}

func (r *Relay) getConnections(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, "limit")
	limit := q.limit()
	if !q.refused(w) {
		answer(w, http.StatusOK, map[string]any{"connections": r.dialogues.list(limit)})
	}
}

// closeConnections cuts all connections, as a relay that is restarted.
func (r *Relay) closeConnections(w http.ResponseWriter, _ *http.Request) {
	r.smtp.CloseClientConnections()
	answer(w, http.StatusOK, struct{}{})
}

func (r *Relay) getConnection(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, "after")
	line := int(q.number("after", 0, 0, 1<<62))
	if q.refused(w) {
		return
	}
	n, _ := strconv.Atoi(req.PathValue("n"))
	c, lines, ok := r.dialogues.get(n, line)
	if !ok {
		fail(w, http.StatusNotFound, "there is no such connection, or it is forgotten")
		return
	}
	answer(w, http.StatusOK, struct {
		Connection
		Lines []Line `json:"lines"`
	}{c, lines})
}

func (r *Relay) getRefusals(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, "limit")
	limit := q.limit()
	if !q.refused(w) {
		answer(w, http.StatusOK, map[string]any{"refusals": notNil(r.dialogues.latestRefusals(limit))})
	}
}

func (r *Relay) getFaults(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, map[string]any{"faults": r.faults.all()})
}

// postFault sets a fault: as a FaultSpec, or as {"text": "…"} in the form of --fault.
func (r *Relay) postFault(w http.ResponseWriter, req *http.Request) {
	var in struct {
		Text string `json:"text"`
		FaultSpec
	}
	if !readJSON(w, req, &in) {
		return
	}
	spec, err := in.FaultSpec, error(nil)
	switch {
	case in.Text == "":
		err = spec.check()
	case spec != FaultSpec{}:
		err = errors.New("text, or the other fields: not both")
	default:
		spec, err = ParseFault(in.Text)
	}
	if err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	f, err := r.faults.add(spec)
	if err != nil {
		fail(w, http.StatusConflict, err.Error())
		return
	}
	answer(w, http.StatusCreated, f)
}

func (r *Relay) deleteFaults(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, map[string]int{"deleted": r.faults.remove(0)})
}

// faultID returns the number in the path of a request, or -1.
func faultID(req *http.Request) int {
	id, err := strconv.Atoi(req.PathValue("id"))
	if err != nil || id < 1 {
		return -1
	}
	return id
}

// answerFault answers with a fault, if there is one.
func answerFault(w http.ResponseWriter, f Fault, ok bool) {
	if !ok {
		fail(w, http.StatusNotFound, "there is no such fault")
		return
	}
	answer(w, http.StatusOK, f)
}

func (r *Relay) getFault(w http.ResponseWriter, req *http.Request) {
	f, ok := r.faults.get(faultID(req))
	answerFault(w, f, ok)
}

func (r *Relay) waitFault(w http.ResponseWriter, req *http.Request) {
	q := readQuery(req, "hits timeout")
	hits, timeout := int(q.number("hits", 1, 1, 1<<31)), q.time("timeout", 10*time.Second, mostWaited)
	if q.refused(w) {
		return
	}
	ctx, cancel := context.WithTimeout(req.Context(), timeout)
	defer cancel()
	f, ok, err := r.faults.wait(ctx, faultID(req), hits)
	if ok && (err != nil || f.Hits < hits) {
		fail(w, http.StatusGatewayTimeout, fmt.Sprintf("the fault has struck %d of %d times", f.Hits, hits))
		return
	}
	answerFault(w, f, ok)
}

func (r *Relay) patchFault(w http.ResponseWriter, req *http.Request) {
	var in struct {
		On *bool `json:"on"`
	}
	if !readJSON(w, req, &in) {
		return
	}
	if in.On == nil {
		fail(w, http.StatusBadRequest, `want {"on": true} or {"on": false}`)
		return
	}
	f, ok := r.faults.turn(faultID(req), *in.On)
	answerFault(w, f, ok)
}

func (r *Relay) deleteFault(w http.ResponseWriter, req *http.Request) {
	n := r.faults.remove(faultID(req))
	if n == 0 {
		fail(w, http.StatusNotFound, "there is no such fault")
		return
	}
	answer(w, http.StatusOK, map[string]int{"deleted": n})
}
