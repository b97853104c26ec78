# The public names of llavakit, once: type checkers read them here, and so does the package itself.
# Everything in `llavakit.contracts` is public, too; all else is not.
from .contracts.component import (
    Component as Component,
    InputPath as InputPath,
    Options as Options,
    SkippableUse as SkippableUse,
    Use as Use,
)
from .contracts.data import (
    ImageContext as ImageContext,
    ImageFile as ImageFile,
    ImageSource as ImageSource,
    Message as Message,
    Question as Question,
    Reply as Reply,
    Sample as Sample,
    Score as Score,
    Turn as Turn,
    Video as Video,
)
from .contracts.errors import (
    ChatError as ChatError,
    DataError as DataError,
    LlavaError as LlavaError,
    ModelError as ModelError,
    PluginError as PluginError,
    RecipeError as RecipeError,
    ReplyError as ReplyError,
    TrainingError as TrainingError,
    and_more as and_more,
    did_you_mean as did_you_mean,
)
from .contracts.hooks import (
    hookimpl as hookimpl,
)
from .contracts.interfaces import (
    Benchmark as Benchmark,
    ChatModel as ChatModel,
    Dataset as Dataset,
    Exporter as Exporter,
    Generator as Generator,
    PromptTemplate as PromptTemplate,
    Segment as Segment,
    Tracker as Tracker,
)
from .contracts.model import (
    Model as Model,
    Sampling as Sampling,
)
from .contracts.networks import (
    Connector as Connector,
    LanguageModel as LanguageModel,
    VisionEncoder as VisionEncoder,
)
from .contracts.run import (
    Build as Build,
    Outcome as Outcome,
    Progress as Progress,
    Run as Run,
    Step as Step,
    Stopped as Stopped,
)
from .contracts.sections import (
    Card as Card,
    Curves as Curves,
    Gallery as Gallery,
    Section as Section,
    Table as Table,
)
from .engine.distributed import join_process_group as join_process_group
from .engine.events import finite as finite
from .engine.interrupts import interrupts as interrupts
from .engine.plan import Plan as Plan, make_plan as make_plan
from .engine.progress import (
    duration as duration,
    one_line as one_line,
    say as say,
    show_progress as show_progress,
)
from .engine.reuse import (
    STEP_DONE as STEP_DONE,
    Finder as Finder,
    record_changes as record_changes,
    step_contents as step_contents,
)
from .engine.runner import run as run
from .model.answer import (
    Answer as Answer,
    Answering as Answering,
)
from .model.folder import (
    cast_weights as cast_weights,
    join_model as join_model,
    save_model as save_model,
    sketch_model as sketch_model,
)
from .model.llava import (
    LlavaModel as LlavaModel,
)
from .model.load import (
    load as load,
    pick_device as pick_device,
    sketch_any as sketch_any,
)
from .model.prefix import (
    Prefixes as Prefixes,
)
from .model.sampling import (
    Token as Token,
    Written as Written,
    choose_tokens as choose_tokens,
)
from .recipe.check import (
    Checker as Checker,
    boundless as boundless,
    problems_in as problems_in,
)
from .recipe.files import (
    HASHED_BYTES as HASHED_BYTES,
    JsonLines as JsonLines,
    differs as differs,
    digest as digest,
    explain_write as explain_write,
    link_folder as link_folder,
    listed_file as listed_file,
    new_file as new_file,
    new_folder as new_folder,
    one_writer as one_writer,
    peek_json as peek_json,
    printable_json as printable_json,
    sync as sync,
    without_none as without_none,
    write_text as write_text,
)
from .recipe.model_choice import (
    PARTS as PARTS,
    ModelRecipe as ModelRecipe,
    is_model as is_model,
)
from .recipe.overrides import (
    Key as Key,
    Source as Source,
    Span as Span,
    set_key as set_key,
    stated as stated,
)
from .recipe.recipe import (
    Published as Published,
    Recipe as Recipe,
    find_recipe as find_recipe,
    recipe_files as recipe_files,
    recipe_folder as recipe_folder,
)
from .recipe.redaction import (
    hide as hide,
    is_key as is_key,
    is_secret_name as is_secret_name,
    printable as printable,
    redact as redact,
    redacted as redacted,
    shown as shown,
)
from .registry import (
    Registry as Registry,
    all_kinds as all_kinds,
    kind_of as kind_of,
    no_exit as no_exit,
)
from .stream.attention import (
    packed_attention as packed_attention,
)
from .stream.batch import (
    PackedBatch as PackedBatch,
    pack as pack,
)
from .stream.detokenise import (
    AnswerText as AnswerText,
    Unfinished as Unfinished,
    special_stops as special_stops,
)
from .stream.encode import (
    IMAGE_ID as IMAGE_ID,
    Encoded as Encoded,
    Encoder as Encoder,
    encode as encode,
    tokenise as tokenise,
)
from .stream.images import (
    USUAL as USUAL,
    Views as Views,
    image_size as image_size,
    open_image as open_image,
    read_pixels as read_pixels,
)
from .stream.messages import (
    VIDEO as VIDEO,
    Visuals as Visuals,
    read_asked as read_asked,
    read_messages as read_messages,
)
from .stream.tiling import (
    Arrangement as Arrangement,
    Clip as Clip,
    Shown as Shown,
    Tiling as Tiling,
    View as View,
    joined as joined,
)
from .stream.tokenise import (
    BoolArray as BoolArray,
    Ids as Ids,
    QuickReader as QuickReader,
    Reader as Reader,
    SpecialTokens as SpecialTokens,
)

__version__: str
__all__: list[str]
