// Package sqlitestore keeps the messages of an outbox in a folder: an SQLite database, and large bodies beside it.
//
// A method that returns nil has written to the disk: the database has a write-ahead log and synchronous=FULL, and one fsync commits the
// requests that came together. A body of more than 64 KiB is a file of its own, which is synced, and its folder too, before the message
// that names it is committed. That holds as far as the disk keeps what it has confirmed. The small bodies of accepted messages are removed
// from the database many at once, or with the message.
//
// Several processes may open a folder and enqueue; one of them at a time is the worker. The folder must be on a disk of this machine:
// SQLite's locks do not work on network file systems.
package sqlitestore

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
)

// Store is an [outbox.Store] in a folder.
type Store struct {
	dir    string
	write  *sql.DB // one connection, for commit alone
	read   *sql.DB
	often  map[string]*sql.Stmt // prepared, on write or on read
	orders chan order
	gone   []int64       // used by commit alone: messages that were accepted, unless their transaction has failed
	done   chan struct{} // closed when commit has ended
	closed chan struct{} // closed by Close

	closing  sync.Once
	mu       sync.Mutex         // guards the fields below
	claimed  map[string]claimed // by ID
	claiming bool
	released []string // while claiming: what it reads may be older
	last     string   // the tenant that had its turn last
	left     int      // of that turn: what no claim had room for
}

// claimed is a message that is claimed.
type claimed struct {
	tenant string
	seq    int64
	file   string // of its body, if it has one
}

var _ outbox.Store = (*Store)(nil)

// A message that is Queued is ready, or waits for its time: messages that wait are not looked at when others are claimed.
const waiting = -1

// layout is the number of the schema: another schema has another one.
const layout = 3

const schema = `
CREATE TABLE IF NOT EXISTS message (
	seq INTEGER PRIMARY KEY,
	id TEXT NOT NULL UNIQUE,
	state INTEGER NOT NULL,
	tenant TEXT NOT NULL,
	priority INTEGER NOT NULL,
	due INTEGER NOT NULL,
	changed INTEGER NOT NULL,
	item BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS intent (seq INTEGER PRIMARY KEY, nonce TEXT NOT NULL, changed INTEGER NOT NULL); -- the message with this seq is Sending; in its row it is Queued
CREATE INDEX IF NOT EXISTS message_ready ON message (tenant, priority DESC, seq) WHERE state = 0;
CREATE INDEX IF NOT EXISTS message_waiting ON message (due) WHERE state = -1;
CREATE INDEX IF NOT EXISTS message_state ON message (state, seq) WHERE state <> 2;
CREATE INDEX IF NOT EXISTS message_ended ON message (changed) WHERE state IN (2, 5);
CREATE TABLE IF NOT EXISTS body (seq INTEGER PRIMARY KEY, file TEXT NOT NULL, text BLOB); -- that of the message with this seq
CREATE INDEX IF NOT EXISTS body_file ON body (file) WHERE file <> '';
`

// The statements of a message's usual way. begin and end are compare-and-set. An intent is a row of a small table, and the message's own row is not touched
// before its end: its page, and those of its indexes, are written once.
const (
	insert = `INSERT INTO message (id, state, tenant, priority, due, changed, item) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING`

	insertBody = `INSERT INTO body (seq, file, text) VALUES (?, ?, ?)`

	begin = `INSERT INTO intent (seq, nonce, changed) SELECT seq, ?, ? FROM message WHERE id = ? AND state <= 0
		ON CONFLICT (seq) DO UPDATE SET changed = excluded.changed WHERE nonce = excluded.nonce`

	end = `UPDATE message SET state = ?, due = ?, changed = ?, item = ? WHERE seq = ? AND id = ? AND state <= 0
		AND NOT EXISTS (SELECT 1 FROM intent i WHERE i.seq = message.seq AND i.nonce <> ?)`

	endIntent = `DELETE FROM intent WHERE seq = ?`

	endBodies = `DELETE FROM body WHERE seq IN (SELECT j.value FROM json_each(?) j JOIN message m ON m.seq = j.value WHERE m.state = 2)`

	// Without statistics SQLite would take the index of the state, and read all that is queued.
	nextDue     = `SELECT min(due) FROM message INDEXED BY message_waiting WHERE state = -1`
	tenantAfter = `SELECT min(tenant) FROM message INDEXED BY message_ready WHERE state = 0 AND tenant > ?`
	firstTenant = `SELECT min(tenant) FROM message INDEXED BY message_ready WHERE state = 0`

	ready = `SELECT ` + columns + `, b.file, b.text FROM message m INDEXED BY message_ready LEFT JOIN intent i ON i.seq = m.seq JOIN body b ON b.seq = m.seq
		WHERE m.state = 0 AND m.tenant = ? AND i.seq IS NULL AND m.seq NOT IN (SELECT value FROM json_each(?)) ORDER BY m.priority DESC, m.seq LIMIT ?`
)

// Open opens the store in dir, which is created if it is not there.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(filepath.Join(dir, bodies), 0o700); err != nil {
		return nil, fmt.Errorf("sqlitestore: %w", err)
	}
	return open(dir, "rwc")
}

// OpenExisting opens the store in dir, as Open does, if there is one. An error that is [fs.ErrNotExist] means that there is none.
func OpenExisting(dir string) (*Store, error) {
	if _, err := os.Stat(filepath.Join(dir, database)); err != nil {
		return nil, fmt.Errorf("sqlitestore: %w", err)
	}
	return open(dir, "rw")
}

// What is in a folder, beside the files of SQLite and of the worker's lock.
const (
	database = "outbox.db"
	bodies   = "bodies"
)

func open(dir, mode string) (*Store, error) {
	s := &Store{dir: dir, orders: make(chan order, together), done: make(chan struct{}), closed: make(chan struct{}), claimed: map[string]claimed{}}
	if err := s.open(mode); err != nil {
		return nil, fmt.Errorf("sqlitestore: %w", err)
	}
	go s.commit()
	return s, nil
}

func (s *Store) open(mode string) (err error) {
	source := "file:" + (&url.URL{Path: filepath.Join(s.dir, database)}).EscapedPath() +
		"?_pragma=busy_timeout(60000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_txlock=immediate"
	if s.write, err = sql.Open("sqlite", source+"&mode="+mode); err != nil {
		return err
	}
	s.write.SetMaxOpenConns(1)
	if err := s.transact(lay); err != nil {
		return errors.Join(err, s.write.Close())
	}
	s.often = map[string]*sql.Stmt{}
	for _, text := range []string{insert, insertBody, begin, end, endIntent, endBodies} {
		if s.often[text], err = s.write.Prepare(text); err != nil {
			return errors.Join(err, s.write.Close())
		}
	}
	if s.read, err = sql.Open("sqlite", source+"&mode=ro"); err != nil {
		return errors.Join(err, s.write.Close())
	}
	s.read.SetMaxOpenConns(4)
	s.read.SetMaxIdleConns(4)
	for _, text := range []string{nextDue, tenantAfter, firstTenant, ready} {
		if s.often[text], err = s.read.Prepare(text); err != nil {
			return errors.Join(err, s.write.Close(), s.read.Close())
		}
	}
	return nil
}

// lay makes the tables that are not there.
func lay(tx *sql.Tx) error {
	var had, tables int
	if err := tx.QueryRow(`SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version`).Scan(&had, &tables); err != nil {
		return err
	}
	if tables > 0 && had != layout {
		return fmt.Errorf("the database has layout %d, and this version knows layout %d: let the version that wrote it send what is in it", had, layout)
	}
	return execute(tx, fmt.Sprintf(`%s PRAGMA user_version = %d`, schema, layout))
}

func (s *Store) bodies() string { return filepath.Join(s.dir, bodies) }

// Close implements [outbox.Store].
func (s *Store) Close() error {
	s.closing.Do(func() { close(s.closed) })
	<-s.done
	return errors.Join(s.write.Close(), s.read.Close())
}

// Committing.

// order is something to be done in a transaction; several share one.
type order struct {
	do   func(*sql.Tx) error // an error of the database: all of the transaction is undone
	done chan error          // has room for one
}

// together is how many orders share a transaction at most.
const together = 256

var errClosed = errors.New("sqlitestore: closed")

// commit carries out orders until the store is closed: all that have come meanwhile in one transaction.
func (s *Store) commit() {
	defer close(s.done)
	for {
		var batch []order
		select {
		case o := <-s.orders:
			batch = append(batch, o)
		case <-s.closed:
			return
		}
		runtime.Gosched() // whoever is about to ask does so first
		for more := true; more && len(batch) < together; {
			select {
			case o := <-s.orders:
				batch = append(batch, o)
			default:
				more = false
			}
		}
		err := s.transact(func(tx *sql.Tx) error {
			for _, o := range batch {
				if err := o.do(tx); err != nil {
					return err
				}
			}
			return s.removeTexts(tx)
		})
		for _, o := range batch {
			o.done <- err
		}
	}
}

// many is how many bodies are removed from the database together. One by one they cost half of the pages that are written.
const many = 128

// removeTexts removes the bodies of messages that were accepted, once there are many. What is left when the process ends, Forget removes.
func (s *Store) removeTexts(tx *sql.Tx) error {
	if len(s.gone) < many {
		return nil
	}
	list, err := json.Marshal(s.gone)
	if err != nil {
		return err
	}
	s.gone = s.gone[:0]
	_, err = tx.Stmt(s.often[endBodies]).Exec(string(list))
	return err
}

func (s *Store) transact(f func(*sql.Tx) error) error {
	tx, err := s.write.Begin()
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

// durably has do carried out, and returns when that is durable. The end of ctx ends the wait before it is begun only.
func (s *Store) durably(ctx context.Context, do func(*sql.Tx) error) error {
	o := order{do: do, done: make(chan error, 1)}
	select {
	case s.orders <- o:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closed:
		return errClosed
	}
	select {
	case err := <-o.done:
		return err
	case <-s.done:
		select {
		case err := <-o.done:
			return err
		default:
			return errClosed
		}
	}
}

// each has do carried out for each of n, in one transaction. An error of do is that of one; an error of the database is that of all.
func (s *Store) each(ctx context.Context, n int, do func(tx *sql.Tx, i int) (mine, all error)) []error {
	errs := make([]error, n)
	err := s.durably(ctx, func(tx *sql.Tx) (err error) {
		for i := range n {
			if errs[i], err = do(tx, i); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return failed(n, err)
	}
	return errs
}

// failed is err for each of n.
func failed(n int, err error) []error {
	errs := make([]error, n)
	for i := range errs {
		errs[i] = fmt.Errorf("sqlitestore: %w", err)
	}
	return errs
}

// Messages.

// stateOf is the state of i as it stands in the table.
func stateOf(i *outbox.Item, now time.Time) int {
	if i.State == outbox.Queued && i.Due.After(now) {
		return waiting
	}
	return int(i.State)
}

// save writes m, which is there. If it is Sending it keeps its intent, or has one that no delivery knows.
func (m *row) save(tx *sql.Tx) error {
	text, err := json.Marshal(m.Item)
	if err != nil {
		return err
	}
	state := stateOf(&m.Item, time.Now())
	if m.State == outbox.Sending {
		state = int(outbox.Queued)
		err = execute(tx, `INSERT INTO intent (seq, nonce, changed) VALUES (?, '', ?) ON CONFLICT (seq) DO NOTHING`, m.seq, m.Changed.UnixNano())
	} else {
		err = execute(tx, endIntent, m.seq)
	}
	return errors.Join(err, execute(tx, `UPDATE message SET state = ?, due = ?, changed = ?, item = ? WHERE seq = ?`,
		state, m.Due.UnixNano(), m.Changed.UnixNano(), text, m.seq))
}

// columns of messages, with their intents, are what scan reads. State and Changed are in the tables, and not in the item: an intent changes nothing else.
const (
	columns = `m.seq, m.item, iif(i.seq IS NULL, m.state, 1), coalesce(i.changed, m.changed)`
	all     = `SELECT ` + columns + ` FROM message m LEFT JOIN intent i ON i.seq = m.seq`
	byID    = all + ` WHERE m.id = ?`
	begun   = `SELECT ` + columns + ` FROM intent i CROSS JOIN message m ON m.seq = i.seq`
)

// row is a message of the table.
type row struct {
	outbox.Item
	seq int64
}

func (m *row) scan(scan func(...any) error, more ...any) error {
	var item []byte
	var changed int64
	if err := scan(append([]any{&m.seq, &item, &m.State, &changed}, more...)...); err != nil {
		return err
	}
	state := max(m.State, outbox.Queued)
	if err := json.Unmarshal(item, &m.Item); err != nil {
		return err
	}
	m.State, m.Changed = state, time.Unix(0, changed)
	return nil
}

// load reads a message; ErrNotFound if there is none.
func load(r *sql.Row) (m row, err error) {
	if err = m.scan(r.Scan); errors.Is(err, sql.ErrNoRows) {
		err = outbox.ErrNotFound
	}
	return m, err
}

// Put implements [outbox.Store].
func (s *Store) Put(ctx context.Context, entries []outbox.Entry) []error {
	errs := make([]error, len(entries))
	bodies := make([]spool, len(entries))
	texts := make([][]byte, len(entries))
	var good []int
	for i, e := range entries {
		bodies[i].dir = s.bodies()
		texts[i], errs[i] = json.Marshal(e.Item)
		if errs[i] == nil {
			errs[i] = bodies[i].take(e.Body)
		}
		if errs[i] == nil {
			good = append(good, i)
		} else {
			bodies[i].remove()
		}
	}
	added := make([]bool, len(entries))
	for k, err := range s.each(ctx, len(good), func(tx *sql.Tx, k int) (mine, all error) {
		i := good[k]
		added[i], all = s.put(tx, &entries[i].Item, texts[i], &bodies[i])
		return nil, all
	}) {
		errs[good[k]] = err
	}
	for _, i := range good {
		if errs[i] == nil && !added[i] { // where there is an error, the message may be there all the same: else Attach removes it
			bodies[i].remove()
		}
	}
	return errs
}

func (s *Store) put(tx *sql.Tx, i *outbox.Item, text []byte, b *spool) (added bool, err error) {
	r, err := tx.Stmt(s.often[insert]).Exec(i.ID, stateOf(i, time.Now()), i.Tenant, i.Priority, i.Due.UnixNano(), i.Changed.UnixNano(), text)
	if err != nil {
		return false, err
	}
	if n, err := r.RowsAffected(); n == 0 || err != nil {
		return false, err
	}
	seq, err := r.LastInsertId()
	if err != nil {
		return true, err
	}
	file := ""
	if b.name != "" {
		file = filepath.Base(b.name)
	}
	_, err = tx.Stmt(s.often[insertBody]).Exec(seq, file, b.text)
	return true, err
}

// Get implements [outbox.Store].
func (s *Store) Get(ctx context.Context, id string) (outbox.Item, error) {
	m, err := load(s.read.QueryRowContext(ctx, byID, id))
	return m.Item, err
}

// Body implements [outbox.Store].
func (s *Store) Body(ctx context.Context, id string) (io.WriterTo, error) {
	var file string
	var text []byte
	// That of a message that was accepted is removed a little later.
	err := s.read.QueryRowContext(ctx, `SELECT file, text FROM body WHERE seq = (SELECT seq FROM message WHERE id = ? AND state <> 2)`, id).Scan(&file, &text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, outbox.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("sqlitestore: %w", err)
	}
	return s.body(file, text), nil
}

// body is a body as the table has it: the name of its file, or else its text.
func (s *Store) body(file string, text []byte) io.WriterTo {
	if file != "" {
		return fileBody(filepath.Join(s.bodies(), file))
	}
	return smtprelay.Bytes(text)
}

// page is how many messages List holds in memory.
const page = 100

// listed selects the messages in a state of which the seq is more than the first argument, in its order, as many as the second one says. Those that were
// accepted are in no index: there are many, and they are seldom listed. Of those that are ready and those that wait each are in order in
// their index; both together would be sorted for each page.
func listed(state outbox.State) string {
	const after, first = ` AND m.seq > ?1`, ` ORDER BY 1 LIMIT ?2`
	switch state {
	case outbox.Queued:
		const ready, waits = all + ` WHERE m.state <> 2 AND m.state = 0 AND i.seq IS NULL`, all + ` WHERE m.state <> 2 AND m.state = -1 AND i.seq IS NULL`
		return ready + after + ` UNION ALL ` + waits + after + first
	case outbox.Sending:
		return begun + ` WHERE true` + after + first
	case outbox.Accepted:
		return all + ` WHERE m.state = 2` + after + first
	default:
		return all + fmt.Sprintf(` WHERE m.state <> 2 AND m.state = %d`, state) + after + first
	}
}

// List implements [outbox.Store].
func (s *Store) List(ctx context.Context, state outbox.State) iter.Seq2[outbox.Item, error] {
	return func(yield func(outbox.Item, error) bool) {
		for after, more := int64(0), true; more; {
			got, err := scanAll(s.read.QueryContext(ctx, listed(state), after, page))
			if err != nil {
				yield(outbox.Item{}, fmt.Errorf("sqlitestore: %w", err))
				return
			}
			for _, m := range got {
				if after = m.seq; !yield(m.Item, nil) {
					return
				}
			}
			more = len(got) == page
		}
	}
}

// scanAll reads what a query has returned.
func scanAll(rows *sql.Rows, err error) (all []row, _ error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var m row
		if err := m.scan(rows.Scan); err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, rows.Err()
}

// Change implements [outbox.Store].
func (s *Store) Change(ctx context.Context, id string, f func(*outbox.Item) error) error {
	return s.each(ctx, 1, func(tx *sql.Tx, _ int) (mine, all error) {
		m, err := load(tx.QueryRow(byID, id))
		if errors.Is(err, outbox.ErrNotFound) {
			return err, nil
		} else if err != nil {
			return nil, err
		}
		if err := f(&m.Item); err != nil {
			return err, nil
		}
		return nil, m.save(tx)
	})[0]
}

// Count implements [outbox.Store].
func (s *Store) Count(ctx context.Context) (c outbox.Counts, err error) {
	// A message that waits and is due is made ready by the worker, if there is one.
	var due sql.NullInt64
	err = s.read.QueryRowContext(ctx, `SELECT
		(SELECT count(*) FROM message INDEXED BY message_state WHERE state <> 2 AND state BETWEEN -1 AND 0),
		(SELECT count(*) FROM intent),
		(SELECT count(*) FROM message INDEXED BY message_state WHERE state <> 2 AND state = 3),
		(SELECT count(*) FROM message INDEXED BY message_state WHERE state <> 2 AND state = 4),
		(SELECT min(due) FROM (
			SELECT due FROM (SELECT due FROM message INDEXED BY message_state WHERE state <> 2 AND state = 0 AND seq NOT IN (SELECT seq FROM intent) ORDER BY seq LIMIT 1)
			UNION ALL SELECT min(due) FROM message INDEXED BY message_waiting WHERE state = -1) WHERE due <= ?)`,
		time.Now().UnixNano()).Scan(&c.Queued, &c.Sending, &c.Dead, &c.Unknown, &due)
	if err != nil {
		return outbox.Counts{}, fmt.Errorf("sqlitestore: %w", err)
	}
	c.Queued -= c.Sending // whose rows are as before
	if due.Valid {
		c.Oldest = time.Unix(0, due.Int64)
	}
	return c, nil
}

// Forget implements [outbox.Store].
func (s *Store) Forget(ctx context.Context, before time.Time) (n int, err error) {
	var files []string
	err = s.durably(ctx, func(tx *sql.Tx) error {
		rows, err := tx.Query(`SELECT m.seq, coalesce(b.file, '') FROM message m INDEXED BY message_ended LEFT JOIN body b ON b.seq = m.seq WHERE m.state IN (2, 5) AND m.changed < ? LIMIT 1000`, before.UnixNano())
		if err != nil {
			return err
		}
		defer rows.Close()
		var seqs []int64
		for rows.Next() {
			var seq int64
			var file string
			if err := rows.Scan(&seq, &file); err != nil {
				return err
			}
			seqs, files = append(seqs, seq), append(files, file)
		}
		for _, seq := range seqs {
			if err := errors.Join(execute(tx, `DELETE FROM body WHERE seq = ?`, seq), execute(tx, `DELETE FROM message WHERE seq = ?`, seq)); err != nil {
				return err
			}
		}
		n = len(seqs)
		return rows.Err()
	})
	if err != nil {
		return 0, fmt.Errorf("sqlitestore: %w", err)
	}
	s.removeBodies(files)
	return n, nil
}

func execute(tx *sql.Tx, text string, args ...any) error {
	_, err := tx.Exec(text, args...)
	return err
}

func (s *Store) removeBodies(files []string) {
	for _, file := range files {
		if file != "" {
			_ = os.Remove(filepath.Join(s.bodies(), file)) // else Attach does
		}
	}
}

// Working.

// Attach implements [outbox.Store].
func (s *Store) Attach(ctx context.Context) (detach func() error, parked int, err error) {
	file, err := os.OpenFile(filepath.Join(s.dir, "worker"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("sqlitestore: %w", err)
	}
	if err := lock(file); err != nil {
		_ = file.Close()
		return nil, 0, err
	}
	err = s.durably(ctx, func(tx *sql.Tx) error {
		left, err := scanAll(tx.Query(begun))
		if err != nil {
			return err
		}
		for _, m := range left {
			m.State, m.Changed, m.Reason = outbox.Unknown, time.Now(), "the worker died while it was sent"
			if err := m.save(tx); err != nil {
				return err
			}
		}
		parked = len(left)
		return nil
	})
	if err == nil {
		err = s.sweep(ctx)
	}
	if err != nil {
		_ = file.Close()
		return nil, 0, fmt.Errorf("sqlitestore: %w", err)
	}
	return file.Close, parked, nil
}

// sweepAge is how old a body must be that no message names, to be removed: a younger one may be that of a Put under way.
const sweepAge = time.Hour

// sweep removes bodies that no message names: their process has died on the way.
func (s *Store) sweep(ctx context.Context) error {
	files, err := os.ReadDir(s.bodies())
	if err != nil {
		return err
	}
	for _, f := range files {
		var n int
		if err := s.read.QueryRowContext(ctx, `SELECT count(*) FROM body INDEXED BY body_file WHERE file = ? AND file <> ''`, f.Name()).Scan(&n); err != nil {
			return err
		}
		if info, err := f.Info(); n == 0 && err == nil && time.Since(info.ModTime()) > sweepAge {
			s.removeBodies([]string{f.Name()})
		}
	}
	return nil
}

// Claim implements [outbox.Store].
func (s *Store) Claim(ctx context.Context, now time.Time, n int, weight func(tenant string) int) (claims []outbox.Claim, next time.Time, err error) {
	s.mu.Lock()
	s.claiming = true
	s.mu.Unlock()
	claims, next, err = s.claim(ctx, now, n, weight)
	s.mu.Lock()
	s.claiming = false
	released := s.released
	s.released = nil
	s.mu.Unlock()
	s.Release(released...)
	if err != nil {
		var ids []string
		for _, c := range claims {
			ids = append(ids, c.ID)
		}
		s.Release(ids...)
		return nil, time.Time{}, fmt.Errorf("sqlitestore: %w", err)
	}
	return claims, next, nil
}

func (s *Store) claim(ctx context.Context, now time.Time, n int, weight func(tenant string) int) (claims []outbox.Claim, next time.Time, err error) {
	var due sql.NullInt64
	if err := s.often[nextDue].QueryRowContext(ctx).Scan(&due); err != nil {
		return nil, time.Time{}, err
	}
	if due.Valid && due.Int64 <= now.UnixNano() {
		if err := s.durably(ctx, func(tx *sql.Tx) error {
			return execute(tx, `UPDATE message SET state = 0 WHERE seq IN (SELECT seq FROM message WHERE state = -1 AND due <= ? LIMIT 1000)`, now.UnixNano())
		}); err != nil {
			return nil, time.Time{}, err
		}
		if err := s.often[nextDue].QueryRowContext(ctx).Scan(&due); err != nil {
			return nil, time.Time{}, err
		}
	}
	if due.Valid {
		next = time.Unix(0, due.Int64)
	}
	// Around the tenants for as long as there is room; who is alone has all of it.
	s.mu.Lock()
	last, turn := s.last, s.left
	s.mu.Unlock()
	idle := map[string]bool{} // who has no message that is not in hand
	for tenant, passed := last, 0; len(claims) < n && passed <= len(idle); {
		want := n - len(claims)
		if turn == 0 {
			var found bool
			if tenant, found, err = s.tenantAfter(ctx, tenant); err != nil || !found {
				return claims, next, err
			}
			if passed++; idle[tenant] {
				continue
			}
			if turn = max(weight(tenant), 1); tenant == last {
				turn = want
			}
		}
		want = min(want, turn)
		more, err := s.claimOf(ctx, tenant, want)
		claims = append(claims, more...)
		if err != nil {
			return claims, next, err
		}
		if turn -= want; len(more) < want {
			idle[tenant], turn = true, 0
		}
		if len(more) == 0 {
			continue
		}
		last, passed = tenant, 0
		s.mu.Lock()
		s.last, s.left = tenant, turn
		s.mu.Unlock()
	}
	return claims, next, nil
}

// tenantAfter returns the next tenant in the circle that has a message which is ready. It may be in hand.
func (s *Store) tenantAfter(ctx context.Context, tenant string) (_ string, found bool, err error) {
	var following sql.NullString
	if err := s.often[tenantAfter].QueryRowContext(ctx, tenant).Scan(&following); err != nil {
		return "", false, err
	}
	if !following.Valid {
		err = s.often[firstTenant].QueryRowContext(ctx).Scan(&following)
	}
	return following.String, following.Valid, err
}

// claimOf claims up to n messages of a tenant.
func (s *Store) claimOf(ctx context.Context, tenant string, n int) (claims []outbox.Claim, err error) {
	had := []int64{}
	s.mu.Lock()
	for _, c := range s.claimed {
		if c.tenant == tenant {
			had = append(had, c.seq)
		}
	}
	s.mu.Unlock()
	list, err := json.Marshal(had)
	if err != nil {
		return nil, err
	}
	rows, err := s.often[ready].QueryContext(ctx, tenant, string(list), n)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var m row
		var text []byte
		var file string
		if err := m.scan(rows.Scan, &file, &text); err != nil {
			return claims, err
		}
		c := outbox.Claim{Item: m.Item, Nonce: rand.Text(), Body: s.body(file, text)}
		s.mu.Lock()
		s.claimed[c.ID] = claimed{tenant, m.seq, file}
		s.mu.Unlock()
		claims = append(claims, c)
	}
	return claims, rows.Err()
}

// Release implements [outbox.Store].
func (s *Store) Release(ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claiming {
		s.released = append(s.released, ids...)
		return
	}
	for _, id := range ids {
		delete(s.claimed, id)
	}
}

// Begin implements [outbox.Store].
func (s *Store) Begin(ctx context.Context, intents []outbox.Intent) []error {
	return s.each(ctx, len(intents), func(tx *sql.Tx, k int) (mine, all error) {
		changed, err := affected(tx.Stmt(s.often[begin]), intents[k].Nonce, time.Now().UnixNano(), intents[k].ID)
		if err == nil && !changed {
			return outbox.ErrConflict, nil
		}
		return nil, err
	})
}

// affected reports whether a statement has changed a row.
func affected(stmt *sql.Stmt, args ...any) (bool, error) {
	r, err := stmt.Exec(args...)
	if err != nil {
		return false, err
	}
	n, err := r.RowsAffected()
	return n > 0, err
}

// End implements [outbox.Store]. A message that is not claimed is a conflict.
func (s *Store) End(ctx context.Context, ends []outbox.End) []error {
	texts := make([][]byte, len(ends))
	for k := range ends {
		var err error
		if texts[k], err = json.Marshal(ends[k].Item); err != nil {
			return failed(len(ends), err)
		}
	}
	had := make([]claimed, len(ends))
	s.mu.Lock()
	for k := range ends {
		had[k] = s.claimed[ends[k].ID]
	}
	s.mu.Unlock()
	errs := s.each(ctx, len(ends), func(tx *sql.Tx, k int) (mine, all error) {
		i, seq := &ends[k].Item, had[k].seq
		ended, err := affected(tx.Stmt(s.often[end]), stateOf(i, time.Now()), i.Due.UnixNano(), i.Changed.UnixNano(), texts[k], seq, i.ID, ends[k].Nonce)
		if err != nil {
			return nil, err
		} else if !ended {
			return outbox.ErrConflict, nil
		}
		if i.State == outbox.Accepted {
			s.gone = append(s.gone, seq)
		}
		_, err = affected(tx.Stmt(s.often[endIntent]), seq)
		return nil, err
	})
	for k, err := range errs {
		if err != nil {
			continue
		}
		s.Release(ends[k].ID)
		if ends[k].State == outbox.Accepted {
			s.removeBodies([]string{had[k].file})
		}
	}
	return errs
}

// Bodies.

// inline is how large a body in the database may be.
const inline = 64 << 10

// spool takes a body: into memory, or into a file once it is large.
type spool struct {
	dir  string
	text []byte
	name string // of the file; "": none
	file *os.File
}

// take has body write itself, durably where that is to a file.
func (s *spool) take(body io.WriterTo) error {
	if s.text = []byte{}; body == nil {
		return errors.New("sqlitestore: a message without body")
	}
	if _, err := body.WriteTo(s); err != nil {
		s.close()
		return err
	}
	if s.file == nil {
		return nil
	}
	if err := errors.Join(s.file.Sync(), s.file.Close(), syncDir(s.dir)); err != nil {
		return fmt.Errorf("sqlitestore: %w", err)
	}
	s.text = []byte{}
	return nil
}

// Write implements io.Writer.
func (s *spool) Write(p []byte) (int, error) {
	if s.file == nil && len(s.text)+len(p) <= inline {
		s.text = append(s.text, p...)
		return len(p), nil
	}
	if s.file == nil {
		s.name = filepath.Join(s.dir, rand.Text())
		file, err := os.OpenFile(s.name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return 0, err
		}
		s.file = file
		if _, err := file.Write(s.text); err != nil {
			return 0, err
		}
	}
	return s.file.Write(p)
}

func (s *spool) close() {
	if s.file != nil {
		_ = s.file.Close() // it is given up
	}
}

func (s *spool) remove() {
	if s.name != "" {
		_ = os.Remove(s.name) // else Attach does
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// fileBody is a body in a file of that name.
type fileBody string

// WriteTo implements io.WriterTo.
func (name fileBody) WriteTo(w io.Writer) (int64, error) {
	file, err := os.Open(string(name))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	return io.Copy(w, file)
}
